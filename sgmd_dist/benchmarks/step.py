"""A recipe's optimizer steps against the network passes that they are made of, measured in the same run.

After every step its calls of the networks are done again, bare: as many of each kind, through the same FSDP modules,
with the same shapes and gradients, and nothing between them. So a rollout's random length is matched, and a drift of
the machine meets both. A bare pass is what the model's `velocity` does, forward and, where the step needs it, backward
with gathering, recomputation and reduction. What a step does besides is reported: waiting for batches, the updates
(clipping, optimizer, EMA), and the rest (noise, renoising, guidance, losses, metrics).
"""

from __future__ import annotations

import ctypes
import json
import math
import resource
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sgmd_dist.batch import Batch
from sgmd_dist.benchmarks.report import machine
from sgmd_dist.conditions import Condition
from sgmd_dist.metrics import Timer
from sgmd_dist.models.base import LatentShape, VideoModel
from sgmd_dist.objectives.base import Phase, StepState
from sgmd_dist.parallel.mesh import build_mesh, process_group, world_size
from sgmd_dist.planner.machine import Machine
from sgmd_dist.planner.plan import make_plan
from sgmd_dist.recipe import Recipe
from sgmd_dist.roles import Call, Role, with_blank_image
from sgmd_dist.throughput import peak_tflops
from sgmd_dist.trainer import Trainer

BUDGET = 1.05  # step time over that of its passes
WARM_UP_STEPS = 2
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Pass:
    """A kind of call of one role: how many a step made on average, and what one takes bare."""

    role: str
    kind: str
    shape: list[int]
    calls_per_step: float
    seconds: float


@dataclass
class StepReport:
    """Means over the measured steps, in seconds on the main rank. Ratios are over sums of all measured steps.

    sample_passes: forwards, recomputations and both kinds of backward per sample and step.
    model_tflops: multiply-adds of the passes, recomputation not counted, per second and rank.
    mfu: that over the card's bfloat16 peak; None where that is not known.
    peak_bytes: of one rank, as `peak_is` says. planned_bytes: what the planner expects.
    """

    recipe: str
    world_size: int
    steps: int
    step_s: float
    phases_s: dict[str, float]
    passes: list[Pass]
    passes_s: float
    update_s: float
    batches_s: float
    sample_passes: float
    tokens_per_s: float
    model_tflops: float
    mfu: float | None
    peak_bytes: int
    peak_is: str
    planned_bytes: int
    machine: dict[str, str] = field(default_factory=machine)

    @property
    def over_passes(self) -> float:
        return self.step_s / self.passes_s

    @property
    def over_passes_and_updates(self) -> float:
        return self.step_s / (self.passes_s + self.update_s)

    @property
    def rest_s(self) -> float:
        return self.step_s - self.passes_s - self.update_s - self.batches_s

    def table(self) -> str:
        """What a step takes, line by line."""
        head = f"step, {self.recipe} on {self.world_size} ranks, mean of {self.steps} steps: " + ", ".join(
            f"{key} {value}" for key, value in self.machine.items()
        )
        lines = [head, f"{'':<44}{'a step':>10}{'one, ms':>12}{'s a step':>12}{'share':>8}"]
        lines += [self._line(f"phase {name}", seconds) for name, seconds in self.phases_s.items()]
        for each in self.passes:
            name = f"pass {each.role}, {each.kind}, {'x'.join(map(str, each.shape))}"
            lines.append(self._line(name, each.calls_per_step * each.seconds, each))
        for name in ("passes", "update", "batches", "rest", "step"):
            lines.append(self._line(name, getattr(self, f"{name}_s")))
        rates = f"{self.tokens_per_s:.0f} tokens/s, {self.model_tflops:.3f} TFLOP/s of a rank"
        mfu = "" if self.mfu is None else f", MFU {self.mfu:.1%}"
        planned = f", planned {self.planned_bytes / 2**30:.3f} GiB"
        return "\n".join(
            [
                *lines,
                f"step over passes {self.over_passes:.3f} (budget {BUDGET}), over passes and updates"
                f" {self.over_passes_and_updates:.3f}",
                f"{self.sample_passes:.2f} passes a sample, {rates}{mfu}",
                f"peak {self.peak_bytes / 2**30:.3f} GiB ({self.peak_is}){planned}",
            ]
        )

    def _line(self, name: str, seconds: float, each: Pass | None = None) -> str:
        single = f"{'':>22}" if each is None else f"{each.calls_per_step:>10.2f}{each.seconds * 1e3:>12.3f}"
        return f"{name:<44}{single}{seconds:>12.4f}{seconds / self.step_s:>8.1%}"

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        ratios = {name: getattr(self, name) for name in ("over_passes", "over_passes_and_updates", "rest_s")}
        path.write_text(json.dumps({**asdict(self), **ratios}, indent=1) + "\n")


def run(recipe: Recipe, num_steps: int) -> StepReport:
    """Measure `num_steps` optimizer steps after two unmeasured ones, on every rank of the launcher's group.

    The run folder serves for the shards that sources make; nothing else in it is read or written.
    """
    with process_group() as device:
        if device.type == "cpu":
            _keep_freed_memory()
        trainer = MeasuredTrainer(recipe, build_mesh(recipe.layout(world_size()), device))
        try:
            return trainer.measure(num_steps)
        finally:
            trainer.close()
            del trainer


class MeasuredTrainer(Trainer):
    """A trainer that times the parts of its steps, and their passes alone."""

    def __init__(self, *args: Any) -> None:
        self._rss_before = _max_rss_bytes()
        self._timers: defaultdict[str, list[Timer]] = defaultdict(list)
        super().__init__(*args)

    def measure(self, num_steps: int) -> StepReport:
        """Take steps, each followed by its passes alone."""
        calls: Counter[tuple[str, Call]] = Counter()
        bare: defaultdict[tuple[str, Call], list[Timer]] = defaultdict(list)
        peaks: list[int] = []
        for number in range(WARM_UP_STEPS + num_steps):
            if number == WARM_UP_STEPS:
                for measured in (calls, bare, self._timers, peaks):
                    measured.clear()
            peaks.append(self._measured_step())
            made = Counter({(name, call): n for name, role in self.roles.items() for call, n in role.calls.items()})
            calls.update(made)
            self.take_scalars()
            self._repeat_bare(made, bare)
        return self._report(num_steps, calls, bare, max(peaks))

    def _measured_step(self) -> int:
        """Take a step; returns the peak of its bytes."""
        if self.mesh.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with self._timed("step"):
            self.train_step()
        if self.mesh.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return _max_rss_bytes() - self._rss_before

    def _train_phase(self, phase: Phase, state: StepState) -> None:
        with self._timed(f"phase {phase.role}"):
            super()._train_phase(phase, state)

    def _batch(self, phase: Phase, state: StepState) -> Batch:
        with self._timed("batches"):
            return super()._batch(phase, state)

    def _update(self, phase: Phase, state: StepState) -> None:
        with self._timed("update"):
            super()._update(phase, state)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        timer = Timer(self.mesh.device)
        yield
        timer.stop()
        self._timers[name].append(timer)

    def _repeat_bare(self, made: Mapping[tuple[str, Call], int], bare: Mapping[tuple[str, Call], list[Timer]]) -> None:
        for (name, call), count in made.items():
            role = self.roles[name]
            self.roles.train_only(name if call.for_weights or call.trains_adapter else None)
            inputs = self._inputs(role, call)
            cotangent = torch.randn(call.shape, device=self.mesh.device)
            dist.barrier()
            timer = Timer(self.mesh.device)
            for _ in range(count):
                bare_pass(role, call, inputs, cotangent)
            timer.stop()
            bare[name, call].append(timer)
            role.module.zero_grad(set_to_none=True)
        self.roles.train_only(None)

    def _inputs(self, role: Role, call: Call) -> tuple[Tensor, Tensor, Condition]:
        device, size = self.mesh.device, call.shape[0]
        x = torch.randn(call.shape, device=device, requires_grad=call.for_input)
        prompts = torch.randn(size, self.recipe.model.text_tokens, role.model.text_dim(), device=device).bfloat16()
        condition = with_blank_image(role.model, prompts, x)
        return x, torch.full((size,), _level(role, call), device=device), condition

    def _report(
        self,
        num_steps: int,
        calls: Mapping[tuple[str, Call], int],
        bare: Mapping[tuple[str, Call], list[Timer]],
        peak_bytes: int,
    ) -> StepReport:
        seconds = {name: sum(timer.seconds() for timer in timers) / num_steps for name, timers in self._timers.items()}
        bare_s = {key: sum(timer.seconds() for timer in timers) for key, timers in bare.items()}
        flops = sum(count * self._flops(self.roles[name], call) for (name, call), count in calls.items()) / num_steps
        data, model_tflops = self.recipe.data, flops / seconds["step"] / 1e12
        samples = data.global_batch_size / self.mesh.dp_size
        recomputes = self.recipe.parallel.activation_checkpointing != "none"
        passes = sum(count * call.passes(recomputes=recomputes) for (_, call), count in calls.items())
        tokens = self._num_tokens(calls)
        peak = peak_tflops(machine()["device"])
        return StepReport(
            recipe=self.recipe.run.name,
            world_size=self.mesh.layout.world_size,
            steps=num_steps,
            step_s=seconds["step"],
            phases_s={k.removeprefix("phase "): v for k, v in seconds.items() if k.startswith("phase ")},
            passes=[
                Pass(
                    self._name(name, call), _kind(call), list(call.shape), count / num_steps, bare_s[name, call] / count
                )
                for (name, call), count in calls.items()
            ],
            passes_s=sum(bare_s.values()) / num_steps,
            update_s=seconds["update"],
            batches_s=seconds["batches"],
            sample_passes=passes / num_steps / samples,
            tokens_per_s=data.global_batch_size * tokens / seconds["step"],
            model_tflops=model_tflops,
            mfu=None if peak is None else model_tflops / peak,
            peak_bytes=peak_bytes,
            planned_bytes=self._planned_bytes(),
            peak_is="max_memory_allocated" if self.mesh.device.type == "cuda" else "growth of the resident set",
        )

    def _name(self, role: str, call: Call) -> str:
        return f"{role} (expert {call.expert})" if self.roles[role].boundaries else role

    def _planned_bytes(self) -> int:
        machine = Machine(1, self.mesh.layout.world_size, 0.0, fused_norms=self.mesh.device.type == "cuda")
        return make_plan(self.recipe, machine).peak_bytes

    def _num_tokens(self, calls: Mapping[tuple[str, Call], int]) -> float:
        """Tokens of a video, mean over the calls."""
        model = cast(VideoModel, self.roles["generator"].model)  # as every recipe's
        lengths = [(model.num_tokens(cast(LatentShape, call.shape[1:])), count) for (_, call), count in calls.items()]
        return sum(length * count for length, count in lengths) / sum(count for _, count in lengths)

    def _flops(self, role: Role, call: Call) -> int:
        """Multiplications and additions of a call with its backward pass on this rank, recomputation not counted."""
        forward = Call(call.shape, False, False, call.expert)
        with FlopCounterMode(display=False, custom_mapping=_FLOPS_OF) as counter:
            bare_pass(role, forward, self._inputs(role, forward), None)
        return counter.get_total_flops() * (1 + (call.for_input or call.for_weights) + call.for_weights)


def bare_pass(role: Role, call: Call, inputs: tuple[Tensor, Tensor, Condition], cotangent: Tensor | None) -> None:
    """One pass of `call`'s kind and nothing else; weight gradients are added to those that are there.

    Args:
        inputs: latents, noise levels, conditions.
        cotangent: of the velocity; needed where there is a backward pass.
    """
    inputs[0].grad = None
    with torch.set_grad_enabled(call.for_input or call.for_weights):
        velocity = role.run(*inputs, _level(role, call))
    if velocity.requires_grad:
        velocity.backward(cotangent)


def _level(role: Role, call: Call) -> float:
    """A noise level that the call's expert serves."""
    return (0.0, *role.boundaries)[call.expert]


def _kind(call: Call) -> str:
    if not (call.for_input or call.for_weights):
        return "forward"
    return "with " + " and ".join(["input"] * call.for_input + ["weight"] * call.for_weights) + " gradients"


def _attention_flops(q: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    """Of queries `[B, L, H, D]` and keys `[B, K, H, D]`: two products."""
    return 4 * math.prod(q) * k[1]


def _ring_flops(q: Sequence[int], kv: Sequence[int], lengths: Sequence[int], *_: Any, **__: Any) -> int:
    return 4 * math.prod(q) * sum(lengths)


_FLOPS_OF = {torch.ops.sgmd_kernels.attention: _attention_flops, torch.ops.sgmd_dist.ring_attention: _ring_flops}


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory, as CUDA's allocator does: else a step, which holds several graphs at once, gives
    memory back to the system and faults it in again, and a pass by itself does not."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that it takes


def _max_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
