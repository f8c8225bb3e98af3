"""Few-step rollouts: backward simulation with a gradient at the exit step, and sampling.

A `Network` is a role, or any callable, that maps (x_sigma `[B, C, F, H, W]`, sigma `[B]`, the condition, level) to a
velocity of x_sigma's shape; see `sgmd_dist.conditions` for the condition and `sgmd_dist.flow` for `level`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from sgmd_dist import flow
from sgmd_dist.conditions import Condition, joined, text_of, with_text

Network = Callable[[Tensor, Tensor, Condition, float], Tensor]
GuidanceMode = Literal["batched", "separate"]


def guided(
    network: Network,
    condition: Condition,
    negative_embeds: Tensor,
    guidance_scale: float,
    mode: GuidanceMode = "batched",
) -> flow.Velocity:
    """`network` under classifier-free guidance, as a function of (x, sigma, level).

    Args:
        condition: of B samples.
        negative_embeds: `[1, T, D]`, in place of every sample's text; images stay.
        guidance_scale: 1.0 means none, and takes one pass instead of two.
        mode: `batched` runs both conditions as one forward of 2B samples, `separate` as two forwards.
    """
    if guidance_scale == 1.0:
        return lambda x, sigma, level: network(x, sigma, condition, level)
    negative = with_text(condition, negative_embeds.expand_as(text_of(condition)))

    def separate(x: Tensor, sigma: Tensor, level: float) -> Tensor:
        return flow.guide(network(x, sigma, condition, level), network(x, sigma, negative, level), guidance_scale)

    def batched(x: Tensor, sigma: Tensor, level: float) -> Tensor:
        both = network(torch.cat([x, x]), torch.cat([sigma, sigma]), joined([condition, negative]), level)
        conditional, unconditional = both.chunk(2)
        return flow.guide(conditional, unconditional, guidance_scale)

    return batched if mode == "batched" else separate


def backward_simulation(
    velocity: flow.Velocity,
    noise: Tensor,
    sigmas: Sequence[float],
    exit_index: int,
    *,
    renoise: Callable[[int], Tensor] | None = None,
    first_velocity: Tensor | None = None,
) -> Tensor:
    """The generator's sample at its exit step (DMD2, arXiv 2405.14867, section 4.5).

    Runs the few-step chain from `noise` without gradients up to step `exit_index`, and there predicts x0 under
    the caller's gradient mode.

    Args:
        velocity: the generator, (x, sigma, level) -> velocity.
        noise: `[B, C, F, H, W]`, the chain's start at `sigmas[0]` = 1.
        sigmas: K + 1 descending noise levels, the last one 0.
        exit_index: in {0, ..., K - 1}; equal on all ranks, since it decides how many forwards they run.
        renoise: None for Euler steps; otherwise `renoise(i)` gives the fresh noise with which the x0-prediction
            of step i is brought to `sigmas[i + 1]`.
        first_velocity: the velocity at step 0, where the caller has computed it already.

    Returns:
        x_g of noise's shape.
    """
    x = noise
    for i in range(exit_index + 1):
        sigma = _full(sigmas[i], x)
        known = first_velocity if i == 0 else None
        if i == exit_index:
            return flow.x0_from_velocity(x, velocity(x, sigma, sigmas[i]) if known is None else known, sigma)
        with torch.no_grad():
            v = velocity(x, sigma, sigmas[i]) if known is None else known.detach()
            next_sigma = _full(sigmas[i + 1], x)
            if renoise is None:
                x = flow.euler_step(x, v, sigma, next_sigma)
            else:
                x = flow.add_noise(flow.x0_from_velocity(x, v, sigma), renoise(i), next_sigma)
    raise AssertionError(f"exit index {exit_index} is negative")


@torch.no_grad()
def sample(velocity: flow.Velocity, noise: Tensor, num_steps: int, shift: float) -> Tensor:
    """Integrate from `noise` to x0 with `num_steps` Euler steps on the shifted grid; no gradients."""
    return flow.integrate(velocity, noise, flow.sampling_sigmas(num_steps, shift))


def _full(sigma: float, like: Tensor) -> Tensor:
    return torch.full((like.shape[0],), sigma, dtype=torch.float32, device=like.device)
