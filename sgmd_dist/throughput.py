"""What a rank computes, by formulas, and the rates that follow from it.

Operations are those of the networks' passes that were really made, each with its own shape. What is computed a second
time is no progress and does not count, as is usual for the MFU: recomputed blocks, and the scores that attention's
backward pass forms again.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import cast

import torch

from sgmd_dist.metrics import Metrics
from sgmd_dist.models.base import Gradient, LatentShape, PassShape, VideoModel
from sgmd_dist.recipe import Recipe
from sgmd_dist.roles import Call, Role

PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}  # bfloat16, dense, by a part of the name
_FLOPS, _TOKENS = "perf/flops_per_step", "perf/tokens_per_sample"


def peak_tflops(device_name: str) -> float | None:
    """What the card reaches at most in bfloat16, in TFLOP/s; None where it is not known."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


def flops_of(role: Role, call: Call, recipe: Recipe) -> float:
    """Floating-point operations of a call with its backward pass on this rank."""
    model = cast(VideoModel, role.model)  # as every recipe's
    parallel, latent_shape = recipe.parallel, cast(LatentShape, call.shape[1:])
    shape = PassShape(call.shape[0], latent_shape, recipe.model.text_tokens, parallel.ring, parallel.ulysses)
    gradient: Gradient = "weights" if call.for_weights else "input" if call.for_input else "none"
    costs = model.pass_costs(shape)
    products = sum(part.forward + part.backward(gradient) for part in (costs.linear, costs.rest))
    attention = costs.self_attention.forward + costs.cross_attention.forward
    return products + attention * (1 if gradient == "none" else 3)


def step_flops(roles: Mapping[str, Role], recipe: Recipe) -> float:
    """Operations of all calls that the roles have counted."""
    return sum(count * flops_of(role, call, recipe) for role in roles.values() for call, count in role.calls.items())


def tokens_per_sample(role: Role) -> float:
    """Tokens of a video, mean over the samples of the calls that the role has counted; 0 where there are none."""
    model = cast(VideoModel, role.model)
    samples = [(call.shape, count * call.shape[0]) for call, count in role.calls.items()]
    tokens = sum(count * model.num_tokens(cast(LatentShape, shape[1:])) for shape, count in samples)
    return tokens / max(sum(count for _, count in samples), 1)


class Throughput:
    """The metrics `perf/...` of the steps between two log lines."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._recipe, self._device = recipe, device
        self._peak_tflops = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

    def record(self, metrics: Metrics, roles: Mapping[str, Role], num_steps: int) -> None:
        """Record what this rank did in `num_steps` steps, which `rates` wants reduced over ranks.

        Operations are counted on GPUs alone, as nobody asks for a CPU's, and to trace a network for them takes seconds.
        """
        if self._device.type == "cuda":
            metrics.record(_FLOPS, step_flops(roles, self._recipe) / num_steps)
        metrics.record(_TOKENS, tokens_per_sample(roles["generator"]))
        metrics.record("perf/peak_bytes", peak_bytes(self._device))

    def rates(self, scalars: Mapping[str, float]) -> dict[str, float]:
        """The scalars with what was recorded turned into rates, by the seconds that the steps took."""
        kept = {name: value for name, value in scalars.items() if name not in (_FLOPS, _TOKENS)}
        samples_per_s = self._recipe.data.global_batch_size / scalars["time/step_s"]
        kept |= {"perf/samples_per_s": samples_per_s, "perf/tokens_per_s": samples_per_s * scalars[_TOKENS]}
        if self._device.type == "cuda":
            tflops = scalars[_FLOPS] / scalars["time/step_s"] / 1e12
            kept["perf/tflops_per_gpu"] = tflops
            if self._peak_tflops is not None:
                kept["perf/mfu"] = tflops / self._peak_tflops
        return kept


def peak_bytes(device: torch.device) -> int:
    """On a GPU the most bytes that tensors took since the last call; else the process's largest resident set so far."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
