"""Every loss function against a naive re-statement of the method: explicit loops, autograd, float64, 5-D tensors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from sgmd_dist.objectives import dmd2, flow_matching, sgmd, sid, sim
from sgmd_dist.objectives._distillation import fake_score_loss, score_metrics, teacher_distance
from sgmd_dist.objectives.base import per_sample_mean

SHAPE = (3, 2, 2, 3, 2)  # [B, C, F, H, W]
NUM_ELEMENTS = 24  # of one sample
SCALES = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)  # the samples differ in size: their n must, too


def tensors(count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(count)
    scale = SCALES.reshape(-1, 1, 1, 1, 1)
    return [(scale * torch.randn(SHAPE, dtype=torch.float64, generator=draw)).requires_grad_() for _ in range(count)]


def levels() -> Tensor:
    return torch.tensor([0.02, 0.7, 0.98], dtype=torch.float64)


def loop(element: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """Per sample, the mean of `element(index)` over all indices of that sample, one by one."""
    losses = []
    for b in range(SHAPE[0]):
        total = torch.zeros((), dtype=torch.float64)
        for rest in product(*map(range, SHAPE[1:])):
            total = total + element((b, *rest))
        losses.append(total / NUM_ELEMENTS)
    return torch.stack(losses)


def naive_distance(x_g: Tensor, f_teacher: Tensor) -> Tensor:
    return loop(lambda i: (x_g[i] - f_teacher[i]).abs()).detach()


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
    """Gradients of a sum over the samples with unequal weights; None for an input that the loss does not reach."""
    weighted = (loss * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)).sum()
    return list(torch.autograd.grad(weighted, inputs, allow_unused=True, retain_graph=True)) if inputs else []


def assert_same(ours: Tensor, naive: Tensor, inputs: list[Tensor], stopped: list[Tensor]) -> None:
    """Equal values and gradients; no gradient at all into `stopped`."""
    assert ours.shape == (SHAPE[0],)
    torch.testing.assert_close(ours, naive, atol=0, rtol=1e-12)
    for mine, theirs in zip(gradients(ours, inputs), gradients(naive, inputs), strict=True):
        assert mine is not None and theirs is not None and theirs.abs().min() > 0
        torch.testing.assert_close(mine, theirs, atol=0, rtol=1e-10)
    assert all(g is None or not g.any() for g in gradients(ours, stopped)), "a stop-gradient is missing"


def test_teacher_distance_is_a_mean_per_sample_without_gradient() -> None:
    x_g, f_teacher = tensors(2)
    n = teacher_distance(x_g, f_teacher)
    torch.testing.assert_close(n, naive_distance(x_g, f_teacher))
    assert not n.requires_grad
    assert n[0] < n[1] / 10 < n[2] / 100


def test_fisher() -> None:
    """mean of ½ (f_F - sg f_T)² / (n + 1e-8), n = mean |x_g - f_T| of that sample, no gradient."""
    f_fake, f_teacher, x_g = tensors(3)
    n = naive_distance(x_g, f_teacher)
    naive = loop(lambda i: 0.5 * (f_fake[i] - f_teacher[i].detach()) ** 2 / (n[i[0]] + 1e-8))
    ours = sgmd.fisher_loss(f_fake, f_teacher, teacher_distance(x_g, f_teacher))
    assert_same(ours, naive, [f_fake], [f_teacher, x_g])


def test_fisher_sends_no_gradient_into_a_normalizer_that_has_one() -> None:
    f_fake, f_teacher, x_g = tensors(3)
    n = per_sample_mean((x_g - f_teacher).abs())
    assert not any(g is not None and g.any() for g in gradients(sgmd.fisher_loss(f_fake, f_teacher, n), [x_g]))


def test_fisher_is_finite_where_the_sample_is_the_teachers() -> None:
    f_fake, f_teacher = tensors(2)
    loss = sgmd.fisher_loss(f_fake, f_teacher, teacher_distance(f_teacher, f_teacher))
    assert loss.isfinite().all() and loss[1] > 1e6


def test_nr_is_a_constant_cotangent_on_the_fakes_prediction() -> None:
    """½ MSE(f_F, sg(f_F - r)) with r = (f_F - sg x_g) / max(sigma, 1e-8): same gradient; and the mean form's value."""
    f_fake, x_g = tensors(2)
    sigma = levels()
    ours = sgmd.nr_loss(f_fake, x_g, sigma)

    def cotangent(i: tuple[int, ...]) -> Tensor:
        r = (f_fake[i] - x_g[i].detach()) / max(sigma[i[0]].item(), 1e-8)
        return 0.5 * (f_fake[i] - (f_fake[i] - r).detach()) ** 2

    mine, theirs = gradients(ours, [f_fake])[0], gradients(loop(cotangent), [f_fake])[0]
    torch.testing.assert_close(mine, theirs, atol=0, rtol=1e-9)
    naive = loop(lambda i: 0.5 * (f_fake[i] - x_g[i].detach()) ** 2 / max(sigma[i[0]].item(), 1e-8))
    assert_same(ours, naive, [f_fake], [x_g])


def test_nr_divides_by_at_least_1e_8() -> None:
    f_fake, x_g = tensors(2)
    at_zero = sgmd.nr_loss(f_fake, x_g, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(at_zero, loop(lambda i: 0.5 * (f_fake[i] - x_g[i]) ** 2 / 1e-8))


def test_rc() -> None:
    """½ MSE(v_F, eps - sg x_g)."""
    v_fake, noise, x_g = tensors(3)
    naive = loop(lambda i: 0.5 * (v_fake[i] - (noise[i] - x_g[i].detach())) ** 2)
    assert_same(sgmd.rc_loss(v_fake, noise, x_g), naive, [v_fake], [x_g])


def test_alpha() -> None:
    x_g, f_teacher = tensors(2)
    n, sigma = teacher_distance(x_g, f_teacher), torch.tensor([0.0, 0.5, 0.98], dtype=torch.float64)
    expected = [0.3 * n[b].item() / (2.0 * max(sigma[b].item(), 1e-8)) for b in range(3)]
    assert sgmd.alpha(n, sigma, nr_weight=0.3, fisher_weight=2.0).tolist() == pytest.approx(expected, rel=1e-12)


def test_dmd() -> None:
    """½ MSE(x_g, sg(x_g - g)), g = (f_F - f_T) / (n + 1e-8) without gradient."""
    x_g, f_fake, f_teacher = tensors(3)
    n = naive_distance(x_g, f_teacher)

    def element(i: tuple[int, ...]) -> Tensor:
        g = (f_fake[i].detach() - f_teacher[i].detach()) / (n[i[0]] + 1e-8)
        return 0.5 * (x_g[i] - (x_g[i] - g).detach()) ** 2

    gradient = dmd2.dmd_gradient(f_fake, f_teacher, teacher_distance(x_g, f_teacher))
    ours = dmd2.dmd_loss(x_g, gradient)
    assert_same(ours, loop(element), [x_g], [f_fake, f_teacher])
    torch.testing.assert_close(gradients(ours, [x_g])[0][1], -2 * gradient[1].detach() / NUM_ELEMENTS)  # type: ignore[index]


def test_fake_score_loss_of_dmd2_has_no_half() -> None:
    v_fake, noise, x_g = tensors(3)
    naive = loop(lambda i: (v_fake[i] - (noise[i] - x_g[i].detach())) ** 2)
    assert_same(fake_score_loss(v_fake, noise, x_g), naive, [v_fake], [x_g])


def test_sids_terms() -> None:
    """(f_T - f_F)² / (n + 1e-8) and Δ (f_F - x_g) / (n + 1e-8), each a mean; gradients to all but n."""
    x_g, f_fake, f_teacher, delta = tensors(4)
    n = naive_distance(x_g, f_teacher)
    fisher = loop(lambda i: (f_teacher[i] - f_fake[i]) ** 2 / (n[i[0]] + 1e-8))
    normalizer = per_sample_mean((x_g - f_teacher).abs())  # with a graph, which the terms must cut
    assert_same(sid.fisher_term(f_fake, f_teacher, normalizer), fisher, [f_fake, f_teacher], [x_g])
    identity = loop(lambda i: delta[i] * (f_fake[i] - x_g[i]) / (n[i[0]] + 1e-8))
    assert_same(sid.identity_term(x_g, f_fake, delta, normalizer), identity, [x_g, f_fake, delta], [f_teacher])


def test_what_sim_leaves_of_a_difference() -> None:
    """c / sqrt(|Δ|² + c²), c = huber_c sqrt(numel), |Δ| over all elements of a sample; with a gradient."""
    (delta,) = tensors(1)
    c = 0.3 * NUM_ELEMENTS**0.5
    naive = c / (loop(lambda i: delta[i] ** 2) * NUM_ELEMENTS + c**2) ** 0.5
    assert_same(sim.huber_shrinkage(delta, 0.3), naive, [delta], [])


def test_flow_matching_loss() -> None:
    velocity, x0, noise = tensors(3)
    naive = loop(lambda i: (velocity[i] - (noise[i].detach() - x0[i].detach())) ** 2)
    assert_same(flow_matching.flow_matching_loss(velocity, x0.detach(), noise.detach()), naive, [velocity], [])


def test_a_sample_does_not_feel_its_neighbours_in_the_batch() -> None:
    """Losses, gradients and normalizers of sample 1 stay what they are when samples 0 and 2 change."""
    f_fake, f_teacher, x_g, noise = tensors(4)
    sigma = levels()

    def losses(changed: Tensor) -> list[Tensor]:
        n = teacher_distance(changed, f_teacher)
        return [
            sgmd.fisher_loss(changed, f_teacher, n)[1],
            sgmd.nr_loss(changed, x_g, sigma)[1],
            sgmd.rc_loss(changed, noise, x_g)[1],
            dmd2.dmd_loss(changed, dmd2.dmd_gradient(changed.detach(), f_teacher, n))[1],
            fake_score_loss(changed, noise, x_g)[1],
            sid.fisher_term(changed, f_teacher, n)[1],
            sid.identity_term(x_g, changed, f_teacher - changed, n)[1],
            sim.huber_shrinkage(changed, 0.3)[1],
            flow_matching.flow_matching_loss(changed, x_g, noise)[1],
        ]

    factor = torch.tensor([7.0, 1.0, -3.0], dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    other = (factor * f_fake).detach().requires_grad_()
    for before, after in zip(losses(f_fake), losses(other), strict=True):
        assert before.item() == after.item()
        gradient = torch.autograd.grad(after, other, retain_graph=True)[0]
        assert gradient[1].abs().min() > 0 and not gradient[[0, 2]].any()


def test_score_metrics() -> None:
    """The tracking residual is ½ mean((f_F - x_g)² / (n + 1e-8)); per sample, without graph."""
    x_g, f_fake, f_teacher = tensors(3)
    n = teacher_distance(x_g, f_teacher)
    metrics = score_metrics(x_g, f_fake, f_teacher.detach(), n)
    residual = loop(lambda i: 0.5 * (f_fake[i] - x_g[i]) ** 2 / (n[i[0]] + 1e-8)).mean().item()
    assert {name: value.mean().item() for name, value in metrics.items()} == {
        "fake_score/residual": pytest.approx(residual),
        "generator/teacher_fake_gap": pytest.approx((f_fake - f_teacher).abs().mean().item()),
        "generator/teacher_distance": pytest.approx(n.mean().item()),
    }
    assert not any(value.requires_grad for value in metrics.values())
