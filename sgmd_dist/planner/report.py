"""A plan as a table for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sgmd_dist.durable import write_durably
from sgmd_dist.errors import UserError
from sgmd_dist.planner.advice import Advice
from sgmd_dist.planner.machine import GIB, USABLE_SHARE
from sgmd_dist.planner.plan import Plan

_TERA = 1e12


def table(plan: Plan, advice: Advice | None) -> str:
    """The plan as Markdown tables with a verdict, and the advice where it does not fit."""
    parts = [
        _heading(plan),
        _passes(plan),
        _roles(plan),
        _peaks(plan),
        _communication(plan),
        _time(plan),
        _storage(plan),
    ]
    return "\n\n".join([*parts, verdict(plan), *([] if advice is None else [_advice(plan, advice)])])


def verdict(plan: Plan) -> str:
    """One line: whether it fits."""
    usable, peak = plan.machine.usable_bytes / GIB, plan.peak_bytes / GIB
    room = f"{usable:.1f} GiB ({USABLE_SHARE:.0%} of {plan.machine.gpu_memory:g})"
    if plan.fits:
        return f"FITS: at most {peak:.1f} GiB of {room} on a GPU"
    return f"DOES NOT FIT: {peak:.1f} GiB, {peak - usable:.1f} GiB more than {room} on a GPU"


def write_json(plan: Plan, advice: Advice | None, path: Path) -> None:
    """The plan with every number, and the advice as settings with their peaks and seconds.

    Raises:
        UserError: the file cannot be written.
    """
    derived = ("peak_bytes", "fits", "compute_seconds", "hidden_seconds", "exposed_seconds", "step_seconds")
    content: dict[str, Any] = {**asdict(plan), **{name: getattr(plan, name) for name in derived}}
    content["usable_bytes"] = plan.machine.usable_bytes
    if advice is not None:
        changes = [*advice.changes, *([advice.remedy] if advice.remedy else [])]
        rows = [
            {
                "settings": list(change.settings),
                "price": change.price,
                "peak_bytes": change.plan.peak_bytes,
                "step_seconds": change.plan.step_seconds,
                "fits": change.plan.fits,
            }
            for change in changes
        ]
        content["advice"] = {"changes": rows[: len(advice.changes)], "remedy": rows[-1] if advice.remedy else None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); name another file") from None


def _heading(plan: Plan) -> str:
    machine, layout = plan.machine, plan.layout
    return "\n".join(
        [
            f"recipe   {plan.recipe}, step {plan.step}",
            f"machine  {machine.nodes} nodes x {machine.gpus_per_node} GPUs of {machine.gpu_memory:g} GiB",
            f"ranks    {layout.world_size} = dp_replicate {layout.dp_replicate} x dp_shard {layout.dp_shard} x ring"
            f" {layout.ring} x ulysses {layout.ulysses}, accumulation {layout.accumulation}",
            f"video    latents {'x'.join(map(str, plan.latent_shape))}, {plan.tokens} tokens",
        ]
    )


def _passes(plan: Plan) -> str:
    rows = []
    for phase in plan.planned:
        for planned in phase.passes:
            passes, costs = planned.passes, planned.costs
            linear = costs.linear.forward + costs.rest.forward
            attention = costs.self_attention.forward + costs.cross_attention.forward
            backward = sum(part.backward(passes.gradient) for part in costs.parts)
            rows.append(
                [
                    phase.role,
                    f"{passes.role} x {passes.batch}" if passes.batch > 1 else passes.role,
                    passes.gradient,
                    f"{passes.mean:g}",
                    f"{passes.most}",
                    f"{linear / _TERA:.1f}",
                    f"{attention / _TERA:.1f}",
                    f"{backward / _TERA:.1f}",
                ]
            )
    per_sample = ", ".join(f"{role} {mean:g} ({most} at most)" for role, (mean, most) in plan.passes.items())
    total = sum(mean for mean, _ in plan.passes.values())
    columns = ["phase", "network", "gradient", "passes", "at most"]
    flops = ["linear TFLOP", "attention TFLOP", "backward TFLOP"]
    return "\n".join(
        [
            "Passes of a micro-batch, and the FLOPs of one on a GPU",
            "",
            _grid([*columns, *flops], rows),
            "",
            f"passes of a step per sample, recomputations and backwards included: {total:g} F in all",
            f"({per_sample})",
        ]
    )


def _roles(plan: Plan) -> str:
    rows = [
        [
            role.role,
            f"{role.num_parameters / 1e9:.4f}",
            *(_gib(size) for size in (role.parameters, role.gradients, role.moments, role.ema, role.buffers)),
            _gib(role.total),
        ]
        for role in plan.roles
    ]
    rows.append(["all", "", *[""] * 5, _gib(sum(role.total for role in plan.roles))])
    columns = ["role", "billion parameters", "weights", "gradients", "moments", "EMA", "buffers", "total"]
    return "\n".join(["Weights and their state on a GPU, GiB", "", _grid(columns, rows)])


def _peaks(plan: Plan) -> str:
    rows = [
        [
            phase.role,
            phase.moment.what,
            *map(_gib, (phase.state, phase.samples)),
            *map(_gib, (phase.moment.activations, phase.moment.gathered, phase.moment.reducing, phase.peak)),
        ]
        for phase in plan.phases
    ]
    columns = ["phase", "fullest in", "state", "samples", "activations", "gathered", "reducing", "peak"]
    return "\n".join(["The fullest moment of each phase on a GPU, GiB", "", _grid(columns, rows)])


def _communication(plan: Plan) -> str:
    rows = [
        [
            flow.kind,
            flow.axis,
            "across nodes" if flow.crosses_nodes else "in a node",
            f"{flow.sent_bytes / GIB:.1f}",
            f"{flow.seconds:.2f}",
            "beside it" if flow.hidden else "waits",
        ]
        for flow in plan.flows
    ]
    if not rows:
        return "Communication: none on one rank"
    columns = ["kind", "axis", "where", "GiB sent", "seconds", "computation"]
    return "\n".join(["Communication of a GPU in a step", "", _grid(columns, rows)])


def _time(plan: Plan) -> str:
    flops, machine = plan.flops, plan.machine
    parts = {"linear": flops.linear, "attention": flops.attention, "rest": flops.rest, "again": flops.recomputed}
    listed = ", ".join(f"{name} {value / _TERA:.0f}" for name, value in parts.items())
    longer = "computation" if plan.compute_seconds >= plan.hidden_seconds else "communication"
    return (
        f"step     {flops.total / _TERA:.0f} TFLOP on a GPU ({listed}): {plan.compute_seconds:.1f} s at"
        f" {machine.mfu:.0%} of {machine.peak_tflops:g} TFLOP/s\n"
        f"         communication beside it {plan.hidden_seconds:.1f} s, waited for {plan.exposed_seconds:.1f} s:"
        f" {plan.step_seconds:.1f} s a step, {longer} dominates"
    )


def _storage(plan: Plan) -> str:
    storage = plan.storage
    return (
        f"host     {_gib(storage.node)} GiB a node: a rank's loading {_gib(storage.loading)}, staging"
        f" {_gib(storage.staging)}, offloaded {_gib(storage.offloaded)}\n"
        f"disk     a checkpoint {_gib(storage.checkpoint)} GiB, {_gib(storage.checkpoints)} while the next is written;"
        f" an export {_gib(storage.export)}"
    )


def _advice(plan: Plan, advice: Advice) -> str:
    rows = [
        [
            " ".join(change.settings),
            _gib(change.plan.peak_bytes),
            _gib(plan.peak_bytes - change.plan.peak_bytes),
            f"{change.plan.step_seconds / plan.step_seconds:.2f} x",
            "yes" if change.plan.fits else "no",
            change.price,
        ]
        for change in advice.changes
    ]
    lines = ["What would help, each by itself", ""]
    lines.append(_grid(["set", "peak GiB", "saves GiB", "step time", "fits", "price"], rows))
    if advice.remedy is None:
        lines += ["", "Nothing here makes it fit: take GPUs with more memory, or a smaller model or video."]
    else:
        peak = _gib(advice.remedy.plan.peak_bytes)
        fits = f"It fits with {' '.join(advice.remedy.settings)}: {peak} GiB"
        is_machine = any(setting.startswith("--") for setting in advice.remedy.settings)
        lines += ["", f"{fits}; run it so." if is_machine else f"{fits}; set the recipe so."]
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are lined up: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))} |"

    return "\n".join([line(columns), f"|{'|'.join('-' * (width + 2) for width in widths)}|", *map(line, rows)])
