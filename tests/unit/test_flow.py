"""Rectified flow: conventions, inverses, grids."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sgmd_dist import flow

SIGMA = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)


def pair() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 2, 2, 3, 2, dtype=torch.float64, generator=draw)
    return x0, noise


def test_sigma_0_is_the_sample_and_sigma_1_the_noise() -> None:
    x0, noise = pair()
    x_sigma = flow.add_noise(x0, noise, SIGMA)
    assert torch.equal(x_sigma[0], x0[0]) and torch.equal(x_sigma[2], noise[2])
    torch.testing.assert_close(x_sigma[1], 0.75 * x0[1] + 0.25 * noise[1])


def test_velocity_is_the_derivative_of_the_path() -> None:
    x0, noise = pair()
    step = 1e-3
    difference = (flow.add_noise(x0, noise, SIGMA + step) - flow.add_noise(x0, noise, SIGMA)) / step
    torch.testing.assert_close(flow.velocity_target(x0, noise), difference)
    torch.testing.assert_close(flow.velocity_target(x0, noise), noise - x0)


def test_true_velocity_predicts_x0() -> None:
    x0, noise = pair()
    x_sigma = flow.add_noise(x0, noise, SIGMA)
    torch.testing.assert_close(flow.x0_from_velocity(x_sigma, noise - x0, SIGMA), x0)
    back = flow.velocity_from_x0(x_sigma[1:], x0[1:], SIGMA[1:])
    torch.testing.assert_close(back, (noise - x0)[1:])


def test_euler_is_exact_on_a_straight_path() -> None:
    x0, noise = pair()
    start, end = SIGMA[[1, 2, 1]], SIGMA[[0, 1, 2]]
    moved = flow.euler_step(flow.add_noise(x0, noise, start), noise - x0, start, end)
    torch.testing.assert_close(moved, flow.add_noise(x0, noise, end))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_keep_the_dtype_of_the_samples(dtype: torch.dtype) -> None:
    x0, noise = (x.to(dtype) for x in pair())
    assert flow.add_noise(x0, noise, SIGMA).dtype == dtype
    assert flow.euler_step(x0, noise, SIGMA, SIGMA).dtype == dtype
    assert flow.expand(SIGMA, x0).shape == (3, 1, 1, 1, 1)


def test_guidance_is_diffusers_convention() -> None:
    """1.0 is no guidance, 0.0 unconditional; w overshoots by w - 1."""
    conditional, unconditional = pair()
    torch.testing.assert_close(flow.guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(flow.guide(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(flow.guide(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional)


def test_shift_maps_the_unit_interval_onto_itself_and_undoes_its_inverse() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = flow.shift_sigma(t, 5.0)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted.diff() > 0).all() and (shifted[1:-1] > t[1:-1]).all()
    torch.testing.assert_close(flow.shift_sigma(shifted, 1 / 5), t)
    torch.testing.assert_close(flow.shift_sigma(t, 1.0), t)


def test_sigmas_of_the_four_step_student() -> None:
    assert flow.sampling_sigmas(4, 5.0) == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0], abs=1e-12)
    assert flow.sampling_sigmas(1, 5.0) == [1, 0]


@pytest.mark.parametrize("num_steps", [1, 4, 30, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_sampling_sigmas_fall_from_one_to_zero(num_steps: int, shift: float) -> None:
    sigmas = flow.sampling_sigmas(num_steps, shift)
    assert len(sigmas) == num_steps + 1
    assert sigmas[0] == 1 and sigmas[-1] == 0 and sigmas == sorted(sigmas, reverse=True)


def test_renoise_levels_are_the_shifted_thousand_step_grid() -> None:
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    expected = [5 * t / (1 + 4 * t) for t in (i / 1000 for i in range(1, 1001))]
    torch.testing.assert_close(flow.renoise_sigma(u, 5.0, 0.0, 1.0), torch.tensor(expected, dtype=torch.float64))
    clamped = [min(max(sigma, 0.02), 0.98) for sigma in expected]
    torch.testing.assert_close(flow.renoise_sigma(u, 5.0, 0.02, 0.98), torch.tensor(clamped, dtype=torch.float64))


def test_renoise_levels_at_the_ends_of_the_draw() -> None:
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert flow.renoise_sigma(ends, 5.0, 0.02, 0.98).tolist() == [0.02, 0.98]
    assert flow.renoise_sigma(ends, 1.0, 0.0, 1.0).tolist() == [0.001, 1.0], "no level is 0"


# Levels of models with experts

RENOISE = (5.0, 0.02, 0.98)  # shift, sigma_min, sigma_max
BOUNDARIES = [(), (0.875,), (0.9,), (0.5,), (0.5, 0.875), (0.02,), (0.98,), (0.99,), (0.01,), (0.3, 0.300001)]


def grid_levels(steps: range) -> list[float]:
    u = (torch.arange(len(steps), dtype=torch.float64) + 0.5) / len(steps)
    return flow.renoise_sigma(u, *RENOISE, steps).float().tolist()


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_sections_part_the_renoise_levels_at_the_boundaries(boundaries: tuple[float, ...]) -> None:
    """The same 1000 levels as without experts, each once, and all of a section on the same side of every boundary."""
    sections = flow.renoise_sections(boundaries, *RENOISE)
    levels = [grid_levels(section) for section in sections]
    assert [level for part in levels for level in part] == grid_levels(flow.ALL_STEPS)
    sides = [{tuple(flow.reaches(level, b) for b in boundaries) for level in section} for section in levels]
    assert all(len(side) == 1 for side in sides)
    assert len(set().union(*sides)) == len(sections), "no side is in two sections"


def test_without_boundaries_all_levels_are_one_section() -> None:
    assert flow.renoise_sections((), *RENOISE) == [flow.ALL_STEPS]
    u = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = (torch.floor(u * 1000) + 1) / 1000
    assert torch.equal(flow.renoise_sigma(u, *RENOISE), (5 * t / (1 + 4 * t)).clamp(0.02, 0.98))


def test_sections_of_wan_a14b() -> None:
    """5 t / (1 + 4 t) reaches 0.875 at t = 7/12: 583 timesteps below, 417 above."""
    assert flow.renoise_sections([0.875], *RENOISE) == [range(583), range(583, 1000)]


@pytest.mark.parametrize("steps", [range(583), range(583, 1000), range(999, 1000), range(1)])
def test_a_draw_from_a_section_stays_in_it(steps: range) -> None:
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    first, last = (flow.renoise_level(step, *RENOISE) for step in (steps[0], steps[-1]))
    assert flow.renoise_sigma(ends, *RENOISE, steps).tolist() == [first, last]


def test_levels_of_single_steps_are_those_of_the_grid() -> None:
    singles = [flow.renoise_level(step, *RENOISE) for step in flow.ALL_STEPS]
    assert torch.tensor(singles, dtype=torch.float32).tolist() == grid_levels(flow.ALL_STEPS)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_shifted_levels_between_two_boundaries_keep_their_distribution(shift: float) -> None:
    """Draws of a section by its probability, then inside it, have the quantiles of draws from the whole."""
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    parts = []
    for lowest, highest in ((0.0, 0.5), (0.5, 0.9), (0.9, 1.0)):
        share = flow.shift_sigma(highest, 1 / shift) - flow.shift_sigma(lowest, 1 / shift)
        num = round(20000 * share)
        part = flow.shifted_sigma((torch.arange(num, dtype=torch.float64) + 0.5) / num, shift, lowest, highest)
        assert all(flow.reaches(level, lowest) and (highest == 1 or not flow.reaches(level, highest)) for level in part)
        parts.append(part)
    whole = flow.shifted_sigma(u, shift)
    assert torch.equal(whole, flow.shift_sigma(u, shift).float())
    quantiles = torch.linspace(0.001, 0.999, 50, dtype=torch.float32)
    torch.testing.assert_close(torch.cat(parts).quantile(quantiles), whole.quantile(quantiles), atol=2e-4, rtol=0)


@pytest.mark.parametrize("lowest, highest", [(0.0, 0.9), (0.9, 1.0), (0.0, 0.3)])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_shifted_levels_at_the_ends_of_the_draw_do_not_cross_a_boundary(shift: float, lowest, highest) -> None:
    ends = flow.shifted_sigma(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), shift, lowest, highest).tolist()
    assert all(flow.reaches(level, lowest) and (highest == 1 or not flow.reaches(level, highest)) for level in ends)


def test_integrate_visits_every_level_but_the_last() -> None:
    seen: list[float] = []

    def velocity(x: Tensor, sigma: Tensor, level: float) -> Tensor:
        assert sigma.shape == (3,) and sigma.dtype == torch.float32 and (sigma == sigma[0]).all()
        seen.append(level)
        assert sigma[0] == level
        return 2 * x

    x, _ = pair()
    result = flow.integrate(velocity, x, [1.0, 0.75, 0.5])
    assert seen == [1.0, 0.75]
    torch.testing.assert_close(result, x * (1 - 0.25 * 2) ** 2)


def test_integrate_follows_the_flow_of_a_gaussian() -> None:
    """x0 ~ N(0, s²) has the flow map x_0 = s x_1; Euler's error falls like 1 / num_steps."""
    s = 0.3

    def velocity(x: Tensor, sigma: Tensor, level: float) -> Tensor:
        a = flow.expand(1 - sigma, x)
        return x * (flow.expand(sigma, x) - a * s**2) / (a**2 * s**2 + flow.expand(sigma, x) ** 2)

    x, _ = pair()
    errors = [(flow.integrate(velocity, x, flow.sampling_sigmas(n, 1.0)) - s * x).abs().max() for n in (50, 100, 200)]
    assert errors[0] < 0.05
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, abs=0.2)
