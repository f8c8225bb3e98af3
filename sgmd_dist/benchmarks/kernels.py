"""The fused operations against plain torch, eager and compiled: time, memory bandwidth, error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sgmd_dist.benchmarks.measure import Ceilings, largest_error, median_ms, output_and_gradients
from sgmd_dist.benchmarks.report import Report, Row
from sgmd_dist.benchmarks.shapes import Shapes
from sgmd_kernels import adaln, dispatch, qk_rope, residual, sgmd_loss

# Half precision: rounded once, one unit in the last place. float32: may be a sum over all tokens.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
_EPS = 1e-6
_FISHER_WEIGHT, _NR_WEIGHT = 1.0, 0.1


@dataclass(frozen=True)
class Workload:
    """An operation on inputs of one model.

    fused and plain take `inputs`; the first `num_differentiable` of these take gradients. forward_bytes and
    backward_bytes: what has to be read and written at least once.
    """

    name: str
    fused: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    num_differentiable: int
    forward_bytes: int
    backward_bytes: int


def run(models: Mapping[str, Shapes], dtype: torch.dtype, device: torch.device, repeats: int, *, timed: bool) -> Report:
    """Every operation at the shapes of each model: compared with float64, and timed on CUDA."""
    ceilings = Ceilings.measured(dtype, device, repeats) if timed else None
    report = Report("kernels", str(dtype).removeprefix("torch."), "GB/s", ceilings)
    for model, shapes in models.items():
        for workload in workloads(shapes, dtype, device):
            exact = output_and_gradients(
                workload.plain, [x.double() for x in workload.inputs], workload.num_differentiable
            )
            for variant, function in _variants(workload, timed).items():
                row = Row(workload.name, model, variant, list(workload.inputs[0].shape))
                found = output_and_gradients(function, workload.inputs, workload.num_differentiable)
                row.error, row.correct = largest_error(found, exact, TOLERANCE)
                if ceilings is not None:
                    _time(row, workload, function, ceilings, repeats)
                report.rows.append(row)
    report.compare_with_compile()
    return report


def _variants(workload: Workload, timed: bool) -> dict[str, Callable[..., Tensor]]:
    """On a CPU what compiles is not what a GPU would run: it is left out."""
    own = "triton" if dispatch.runs_triton(*workload.inputs) else "reference"
    variants = {own: workload.fused, "eager": workload.plain}
    if timed:
        torch.compiler.reset()  # a limit of recompilations holds for each function, and shapes here are many
        variants["compile"] = torch.compile(workload.plain, dynamic=False)
    return variants


def _time(row: Row, workload: Workload, function: Callable[..., Tensor], ceilings: Ceilings, repeats: int) -> None:
    with torch.no_grad():
        row.forward_ms = median_ms(lambda: function(*workload.inputs), repeats)
    leaves = [x.detach().requires_grad_() for x in workload.inputs[: workload.num_differentiable]]
    inputs = (*leaves, *workload.inputs[workload.num_differentiable :])
    cotangent = torch.ones_like(function(*inputs))
    row.forward_backward_ms = median_ms(lambda: torch.autograd.grad(function(*inputs), leaves, cotangent), repeats)
    row.rate = (workload.forward_bytes + workload.backward_bytes) / row.forward_backward_ms / 1e6
    row.of_ceiling = row.rate / ceilings.copy_gb_per_s


def workloads(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Iterator[Workload]:
    """The four operations on one video of a model."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    tokens, width = shapes.tokens, shapes.width
    x, y = (normal(1, tokens, width, dtype=dtype) for _ in range(2))
    shift, scale, gate = normal(1, tokens if shapes.timestep_per_token else 1, 6, width).unbind(2)[:3]
    row, modulation = x.nbytes, scale.numel() * scale.element_size()
    yield Workload(
        "adaln", _adaln, _plain_adaln, (x, scale, shift), 3,
        forward_bytes=2 * row + 2 * modulation, backward_bytes=3 * row + 3 * modulation,
    )  # fmt: skip
    yield Workload(
        "gated residual", residual.gated_residual, residual.reference, (x, y, gate), 3,
        forward_bytes=3 * row + modulation, backward_bytes=3 * row + 2 * modulation,
    )  # fmt: skip
    weight, angles = normal(width, dtype=dtype), normal(tokens, shapes.head_size // 2)
    cos, sin = angles.cos(), angles.sin()
    yield Workload(
        "qk norm + rope", _rms_norm_rope, _plain_rms_norm_rope, (x, weight, cos, sin), 2,
        forward_bytes=2 * row + 2 * cos.nbytes, backward_bytes=3 * row + 2 * cos.nbytes,
    )  # fmt: skip
    latents = [normal(1, *shapes.latents) for _ in range(3)]
    scalars = (torch.full((1,), 0.5, device=device), torch.full((1,), 0.7, device=device))
    yield Workload(
        "sgmd outer loss", _outer_loss, _plain_outer_loss, (*latents, *scalars), 1,
        forward_bytes=4 * latents[0].nbytes, backward_bytes=0,
    )  # fmt: skip


def _adaln(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return adaln.adaln(x, scale, shift, eps=_EPS)


def _plain_adaln(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return adaln.reference(x, scale, shift, _EPS)


def _rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return qk_rope.rms_norm_rope(x, weight, cos, sin, eps=_EPS)


def _plain_rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return qk_rope.reference(x, weight, cos, sin, _EPS)


def _outer_loss(*tensors: Tensor) -> Tensor:
    x0_fake, x0_teacher, x_g, normalizer, sigma = tensors
    return sgmd_loss.outer_loss(
        x0_fake, x0_teacher, x_g, normalizer, sigma, fisher_weight=_FISHER_WEIGHT, nr_weight=_NR_WEIGHT
    ).loss


def _plain_outer_loss(x0_fake: Tensor, x0_teacher: Tensor, x_g: Tensor, normalizer: Tensor, sigma: Tensor) -> Tensor:
    """As the objective writes it, for autograd to differentiate."""
    fisher = (x0_fake - x0_teacher).square().flatten(1).mean(1) / (2 * (normalizer + sgmd_loss.EPS))
    nr = (x0_fake - x_g).square().flatten(1).mean(1) / (2 * sigma.clamp_min(sgmd_loss.EPS))
    return _FISHER_WEIGHT * fisher - _NR_WEIGHT * nr
