"""A v-prediction network as a velocity network: exact for a Gaussian, and DDIM's steps are Euler's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from torch import Tensor

from sgmd_dist.flow import add_noise, euler_step
from sgmd_dist.models._variance_preserving import flow_velocity, timestep_of
from sgmd_dist.models.cogvideox import NoiseSchedule

MEAN, STD = 0.7, 0.4  # of the data
SCHEDULES = {
    "5B": {"rescale_betas_zero_snr": True, "snr_shift_scale": 1.0},
    "2B": {"rescale_betas_zero_snr": True, "snr_shift_scale": 3.0},
    "no pure noise": {"rescale_betas_zero_snr": False, "beta_schedule": "linear"},
}


def products(schedule: dict[str, Any]) -> Tensor:
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", **{"snr_shift_scale": 1.0, **schedule})
    return scheduler.alphas_cumprod.double()


def denoiser(schedule: dict[str, Any]) -> Any:
    """The exact v of Gaussian data at fractional timesteps, in the diffusion's own terms."""
    known = _sigmas(products(schedule))

    def predict(z: Tensor, timestep: Tensor) -> Tensor:
        low = timestep.floor().long().clamp(max=len(known) - 2)
        sigma = known[low] + (timestep - low) * (known[low + 1] - known[low])
        signal, noise = ((x / ((1 - sigma) ** 2 + sigma**2).sqrt())[:, None] for x in (1 - sigma, sigma))
        x0 = MEAN + STD**2 * signal * (z - signal * MEAN) / (signal**2 * STD**2 + noise**2)
        return (signal * z - x0) / noise

    return predict


def _sigmas(product: Tensor) -> Tensor:
    noise = (1 - product).sqrt()
    return noise / (product.sqrt() + noise)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("scheduler", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_the_levels_are_those_of_the_pipelines_schedulers(name: str, scheduler: type) -> None:
    made = scheduler(**{"snr_shift_scale": 1.0, **SCHEDULES[name]})
    levels = torch.tensor(NoiseSchedule(**SCHEDULES[name]).levels(), dtype=torch.float64)
    torch.testing.assert_close(levels, _sigmas(made.alphas_cumprod.double()), rtol=0, atol=2e-6)
    assert (levels.diff() > 0).all()
    assert (levels[-1] == 1) == SCHEDULES[name]["rescale_betas_zero_snr"]


@pytest.mark.parametrize("name", ["5B", "2B"])
def test_a_gaussians_velocity_is_exact(name: str) -> None:
    """E[noise - x0 | x_sigma] of the rectified flow, in closed form, for levels on and between timesteps."""
    levels = _sigmas(products(SCHEDULES[name])).tolist()
    sigma = torch.tensor([1.0, 0.98, 0.625, 0.31, levels[500], levels[3]], dtype=torch.float64)
    x = torch.randn(len(sigma), 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = sigma[:, None]
    variance = (1 - s) ** 2 * STD**2 + s**2
    x0 = MEAN + STD**2 * (1 - s) * (x - (1 - s) * MEAN) / variance
    velocity = flow_velocity(denoiser(SCHEDULES[name]), x, sigma, levels)
    torch.testing.assert_close(velocity, (x - x0) / s, rtol=1e-9, atol=1e-9)


def test_any_prediction_becomes_the_velocity_of_its_x0_and_noise() -> None:
    """Not only where v is a denoiser's: v = a noise - s x0 gives noise - x0."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    sigma = torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    signal, amount = ((x / ((1 - sigma) ** 2 + sigma**2).sqrt())[:, None] for x in (1 - sigma, sigma))

    def predict(z: Tensor, _: Tensor) -> Tensor:
        torch.testing.assert_close(z, signal * x0 + amount * noise)
        return signal * noise - amount * x0

    found = flow_velocity(predict, add_noise(x0, noise, sigma), sigma, NoiseSchedule().levels())
    torch.testing.assert_close(found, noise - x0)


def test_steps_of_ddim_are_euler_steps() -> None:
    """diffusers' scheduler from its first timestep to the sample, against Euler on the mapped grid."""
    schedule = SCHEDULES["2B"]
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing", **schedule
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(8)
    levels, predict = _sigmas(scheduler.alphas_cumprod).tolist(), denoiser(schedule)
    z = x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grid = [levels[t] for t in scheduler.timesteps.tolist()] + [0.0]
    assert grid[0] == 1.0
    for t, (sigma, following) in zip(scheduler.timesteps, pairwise(grid), strict=True):
        z = scheduler.step(predict(z, t.double().expand(5)), int(t), z).prev_sample
        now, then = (torch.full((5,), s, dtype=torch.float64) for s in (sigma, following))
        x = euler_step(x, flow_velocity(predict, x, now, levels), now, then)
        scale = ((1 - following) ** 2 + following**2) ** 0.5
        torch.testing.assert_close(x / scale, z, rtol=1e-9, atol=1e-9)


def test_timesteps_are_whole_on_the_grid_and_end_with_it() -> None:
    levels = NoiseSchedule(rescale_betas_zero_snr=False).levels()
    sigma = torch.tensor([0.0, levels[0], levels[1], levels[700], levels[-1], 1.0])
    expected = torch.tensor([0.0, 0.0, 1.0, 700.0, 999.0, 999.0])
    torch.testing.assert_close(timestep_of(sigma, levels), expected, rtol=0, atol=0)
