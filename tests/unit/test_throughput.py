"""Rates follow from the passes that were made, with the operations that torch counts in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sgmd_dist.assemble import build_model
from sgmd_dist.metrics import Metrics
from sgmd_dist.recipe import Recipe
from sgmd_dist.roles import Call, Role
from sgmd_dist.throughput import Throughput, flops_of, peak_tflops, step_flops, tokens_per_sample

SHAPE = (2, 3, 3, 8, 8)
KINDS = {"forward": (False, False), "input": (True, False), "weights": (True, True)}


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe()


@pytest.fixture
def role(recipe: Recipe) -> Role:
    model = build_model(recipe, "generator")
    return Role("generator", model.build(), model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_operations_of_a_call_are_those_that_torch_counts(recipe: Recipe, role: Role, kind: str) -> None:
    for_input, for_weights = KINDS[kind]
    role.set_requires_grad(for_weights)
    x = torch.randn(SHAPE, requires_grad=for_input)
    counter, products = FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH)  # others than these go uncounted
    with counter, products, torch.set_grad_enabled(for_input):
        velocity = role(x, torch.rand(2), torch.randn(2, recipe.model.text_tokens, 32))
        if for_input:
            velocity.sum().backward()
    ((call, count),) = role.calls.items()
    assert count == 1 and (call.for_input, call.for_weights) == (for_input, for_weights)
    assert flops_of(role, call, recipe) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_step_is_the_sum_of_its_calls(recipe: Recipe, role: Role) -> None:
    forward, backward = Call(SHAPE, False, False), Call((4, *SHAPE[1:]), True, True)
    role.calls = Counter({forward: 3, backward: 2})
    expected = 3 * flops_of(role, forward, recipe) + 2 * flops_of(role, backward, recipe)
    assert step_flops({"generator": role, "teacher": role}, recipe) == 2 * expected


def test_tokens_are_the_mean_over_the_samples_of_all_shapes(role: Role) -> None:
    assert tokens_per_sample(role) == 0
    role.calls = Counter({Call((1, 3, 3, 8, 8), False, False): 3, Call((3, 3, 5, 8, 8), True, True): 1})
    assert tokens_per_sample(role) == (3 * 3 * 16 + 3 * 5 * 16) / 6


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA A100-SXM4-40GB", 312.0), ("NVIDIA GeForce RTX 2070", None)],
)
def test_only_known_cards_have_a_peak(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_a_gpu_reports_its_share_of_the_peak(
    recipe: Recipe, role: Role, alone: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    call = Call(SHAPE, False, False)
    role.calls = Counter({call: 6})
    throughput, metrics = Throughput(recipe, torch.device("cuda")), Metrics(alone)
    metrics.record("time/step_s", 2.0)
    throughput.record(metrics, {"generator": role}, num_steps=3)
    tflops = 2 * flops_of(role, call, recipe) / 2.0 / 1e12
    assert throughput.rates(metrics.flush()) == pytest.approx(
        {
            "time/step_s": 2.0,
            "perf/peak_bytes": 2**30,
            "perf/samples_per_s": recipe.data.global_batch_size / 2,
            "perf/tokens_per_s": recipe.data.global_batch_size / 2 * 3 * 16,
            "perf/tflops_per_gpu": tflops,
            "perf/mfu": tflops / 989,
        }
    )


def test_a_cpu_has_rates_and_no_mfu(recipe: Recipe, role: Role, alone: torch.device) -> None:
    role.calls = Counter({Call(SHAPE, False, False): 1})
    throughput, metrics = Throughput(recipe, alone), Metrics(alone)
    metrics.record("time/step_s", 4.0)
    throughput.record(metrics, {"generator": role}, num_steps=1)
    found = throughput.rates(metrics.flush())
    assert found.keys() == {"time/step_s", "perf/samples_per_s", "perf/tokens_per_s", "perf/peak_bytes"}
    assert found["perf/samples_per_s"] == 2 and found["perf/tokens_per_s"] == 2 * 3 * 16
