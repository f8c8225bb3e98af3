"""What saving costs training: the stall, the time until the commit, and the steps beside a save in flight."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from sgmd_dist.assemble import build_networks, build_objective
from sgmd_dist.benchmarks.report import machine
from sgmd_dist.checkpoint import Saver, training_state
from sgmd_dist.checkpoint.state import local
from sgmd_dist.conditions import Condition
from sgmd_dist.parallel.mesh import Mesh
from sgmd_dist.recipe import Recipe
from sgmd_dist.roles import Role, Roles, build_roles, with_blank_image

BUDGET = 0.10  # of a synchronous save's stall
_NUM_QUIET_STEPS = 5
_PARAMETERS_PER_BLOCK = 16.8e6  # of a Wan of width 1024
_HEAD = ("mode", "stall s", "total s", "GB", "GB/s", "step s", "lost s")
_LEVEL = 0.5  # the noise level of the training steps


@dataclass(frozen=True)
class Timing:
    """Medians over the repeats, each the slowest rank's.

    stall_s: training waited for so long: in the call, and for the copy before the next optimizer step.
    total_s: from the call to the commit.
    step_s: of a training step while the save was in flight, without the stall; None where no step was.
    lost_s: what `total_s` holds beyond the steps that were done in it at their quiet pace.
    """

    mode: str
    stall_s: float
    total_s: float
    num_bytes: int
    step_s: float | None
    lost_s: float

    @property
    def gb_per_s(self) -> float:
        return self.num_bytes / self.total_s / 1e9


@dataclass
class Report:
    """Both modes in one run. quiet_step_s: median time of a step without a save."""

    num_parameters: int
    world_size: int
    repeats: int
    quiet_step_s: float
    synchronous: Timing
    asynchronous: Timing
    machine: dict[str, str] = field(default_factory=lambda: machine())

    @property
    def stall_ratio(self) -> float:
        return self.asynchronous.stall_s / self.synchronous.stall_s

    def table(self) -> str:
        """The two modes under a head that names the machine, and the ratio of their stalls with its budget."""
        facts = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        head = [
            f"checkpoint: {facts}",
            f"{self.num_parameters / 1e6:.0f}M trained parameters, {self.world_size} ranks, medians of {self.repeats};"
            f" a step takes {self.quiet_step_s:.3f} s without a save",
        ]
        rows = [_HEAD, *(_cells(timing) for timing in (self.synchronous, self.asynchronous))]
        lines = ["  ".join(cell.rjust(8) if i else cell.ljust(6) for i, cell in enumerate(row)) for row in rows]
        verdict = "within" if self.stall_ratio <= BUDGET else "OVER"
        return "\n".join(
            [*head, *lines, f"async stall / sync stall: {self.stall_ratio:.1%}, {verdict} the budget of {BUDGET:.0%}"]
        )

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = asdict(self) | {"stall_ratio": self.stall_ratio, "budget": BUDGET}
        path.write_text(json.dumps(content, indent=1) + "\n")


def random_wan(millions: float) -> list[str]:
    """Overrides that give a recipe networks of about so many million random parameters each."""
    num_layers = max(1, round(millions * 1e6 / _PARAMETERS_PER_BLOCK))
    config = {"num_layers": num_layers, "num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096}
    return ["model.pretrained=null", f"model.config={json.dumps(config | {'text_dim': 256, 'freq_dim': 256})}"]


def run(recipe: Recipe, mesh: Mesh, run_dir: Path, repeats: int) -> Report:
    """Save the recipe's trained networks in turn synchronously and asynchronously, with steps in between. Collective.

    Args:
        run_dir: a folder of its own on the disk to be measured, removed at the end.
    """
    roles = _build(recipe, mesh)
    quiet = _slowest(statistics.median(_timed(lambda: _step(roles, mesh)) for _ in range(_NUM_QUIET_STEPS)))
    savers = {
        mode: Saver(run_dir / mode, recipe="", keep=1, asynchronous=mode == "async", layout={})
        for mode in ("sync", "async")
    }
    found: dict[str, list[Timing]] = {mode: [] for mode in savers}
    try:
        for repeat in range(repeats + 1):  # the first fills the buffers and the disk's cache, and is not counted
            for mode, saver in savers.items():
                timing = _measure(mode, saver, roles, mesh, repeat, quiet)
                found[mode] += [timing] if repeat else []
    finally:
        for saver in savers.values():
            saver.close()
        dist.barrier()
        if mesh.is_main:
            shutil.rmtree(run_dir, ignore_errors=True)
    return Report(
        num_parameters=sum(p.numel() for role in roles.trained for p in role.parameters.values()),
        world_size=mesh.layout.world_size,
        repeats=repeats,
        quiet_step_s=quiet,
        synchronous=_median(found["sync"]),
        asynchronous=_median(found["async"]),
    )


def _build(recipe: Recipe, mesh: Mesh) -> Roles:
    trained = {name: True for name, is_trained in build_objective(recipe).roles.items() if is_trained}
    networks = build_networks(recipe, mesh, trained)
    recomputes = recipe.parallel.activation_checkpointing != "none"
    roles = build_roles(networks, set(trained), recipe.optim, recipe.run.steps, recomputes=recomputes)
    roles.warm_up(mesh.device)
    return roles


def _measure(mode: str, saver: Saver, roles: Roles, mesh: Mesh, step: int, quiet_step_s: float) -> Timing:
    stalls: list[float] = []
    steps: list[float] = []

    def wait_staged() -> None:
        stalls.append(_timed(saver.wait_staged))

    began = time.perf_counter()
    stalls.append(_timed(lambda: saver.save(roles, step=step, stream={})))
    while _any_rank(saver.is_writing):
        before = sum(stalls)
        duration = _timed(lambda: _step(roles, mesh, before_write=wait_staged))
        steps.append(duration - (sum(stalls) - before))
    saver.wait()
    total_s = _slowest(time.perf_counter() - began)
    num_bytes = sum(
        local(t).numel() * t.element_size() for part in training_state(roles).values() for t in part.values()
    )
    return Timing(
        mode=mode,
        stall_s=_slowest(sum(stalls)),
        total_s=total_s,
        num_bytes=int(_reduced(num_bytes, dist.ReduceOp.SUM)),
        step_s=_slowest(statistics.median(steps)) if steps else None,
        lost_s=total_s - len(steps) * quiet_step_s,
    )


def _step(roles: Roles, mesh: Mesh, before_write: Callable[[], None] = lambda: None) -> None:
    """A training step in small: forward, backward and optimizer step of every trained role."""
    for role in roles.trained:
        roles.train_only(role.name)
        role(*_inputs(role, mesh), _LEVEL).square().mean().backward()
        before_write()
        roles.step(role.name, 0)
    roles.train_only(None)


def _inputs(role: Role, mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """One sample of 8 by 8 patches, and 32 text tokens."""
    channels, frames, height, width = role.model.smallest_latents()
    x = torch.ones(1, channels, frames, 8 * height, 8 * width, device=mesh.device)
    text = torch.ones(1, 32, role.model.text_dim(), device=mesh.device)
    return x, torch.full((1,), _LEVEL, device=mesh.device), with_blank_image(role.model, text, x)


def _timed(function: Callable[[], object]) -> float:
    """Seconds that `function` takes, with what it gave the device to do."""
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _reduced(value: float, op: dist.ReduceOp.RedOpType) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=op)
    return float(tensor)


def _slowest(seconds: float) -> float:
    return _reduced(seconds, dist.ReduceOp.MAX)


def _any_rank(value: bool) -> bool:
    return bool(_reduced(float(value), dist.ReduceOp.MAX))


def _median(timings: list[Timing]) -> Timing:
    steps = [timing.step_s for timing in timings if timing.step_s is not None]
    return Timing(
        mode=timings[0].mode,
        stall_s=statistics.median(timing.stall_s for timing in timings),
        total_s=statistics.median(timing.total_s for timing in timings),
        num_bytes=timings[0].num_bytes,
        step_s=statistics.median(steps) if steps else None,
        lost_s=statistics.median(timing.lost_s for timing in timings),
    )


def _cells(timing: Timing) -> tuple[str, ...]:
    return (
        timing.mode,
        f"{timing.stall_s:.3f}",
        f"{timing.total_s:.3f}",
        f"{timing.num_bytes / 1e9:.2f}",
        f"{timing.gb_per_s:.2f}",
        "-" if timing.step_s is None else f"{timing.step_s:.3f}",
        f"{timing.lost_s:.3f}",
    )
