"""Costs of families without formulas, traced on fake tensors, against what real tensors compute, keep and hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_wan import LiveBytes, kept_bytes
from test_flops import ATTENTION
from tiny_families import FAMILIES, TEXT_WIDTH
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from sgmd_dist import registry
from sgmd_dist.models import _traced_costs
from sgmd_dist.models.base import Gradient, PassShape
from sgmd_dist.parallel.sequence import SequenceAxis
from sgmd_dist.planner.memory import graph_bytes
from sgmd_dist.tracing import Tracer

SHAPE = PassShape(2, (3, 6, 16, 16), 6)
GRADIENTS: tuple[Gradient, ...] = ("input", "weights")


def _forward(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


COUNTED = {
    **ATTENTION,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


def small(name: str, dtype: str) -> Any:
    module = registry.load(registry.MODELS, name)
    config = {**FAMILIES[name].config, "num_layers": 3}
    if "max_text_seq_length" in config:
        config["max_text_seq_length"] = SHAPE.text_tokens
    section = {"compute_dtype": dtype, "config": config, "text_tokens": SHAPE.text_tokens}
    return module.build(module.Section.model_validate(section), None, "model.pretrained")


def network(model: Any, gradient: Gradient) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    module = torch.nn.Module.to(model.build(), model.compute_dtype).requires_grad_(gradient == "weights")
    model.attach(module, SequenceAxis(None))
    latents = torch.randn(SHAPE.batch, *SHAPE.latent_shape, requires_grad=gradient == "input")
    return module, latents, torch.randn(SHAPE.batch, SHAPE.text_tokens, TEXT_WIDTH)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_flops_are_exact(name: str, gradient: Gradient) -> None:
    model = small(name, "float32")
    module, latents, text = network(model, gradient)
    counters = [FlopCounterMode(display=False, custom_mapping=COUNTED) for _ in range(2)]
    with counters[0]:
        velocity = model.velocity(module, latents, torch.full((SHAPE.batch,), 0.5), text)
    with counters[1]:
        velocity.sum().backward()
    costs = model.pass_costs(SHAPE)
    assert costs.num_blocks == 3
    assert counters[0].get_total_flops() == sum(part.forward for part in costs.parts)
    assert counters[1].get_total_flops() == sum(part.backward(gradient) for part in costs.parts)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_a_network_keeps_for_backward(name: str, dtype: str, gradient: Gradient) -> None:
    """Within 3%, and never much less than it is."""
    model = small(name, dtype)
    module, latents, text = network(model, gradient)
    sigma = torch.full((SHAPE.batch,), 0.5)
    kept = kept_bytes(lambda: model.velocity(module, latents, sigma, text), [*module.parameters(), latents, text])
    costs = model.pass_costs(SHAPE)
    assert graph_bytes(costs.activations, costs.num_blocks, gradient, "none") == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_peak_without_a_graph(name: str) -> None:
    """Of the whole network: a block's, with what is kept through it. Within 5%, or four latents, which the planner
    counts by themselves."""
    model = small(name, "bfloat16")
    module, latents, text = network(model, "none")
    with torch.no_grad(), LiveBytes() as live:
        model.velocity(module, latents, torch.full((SHAPE.batch,), 0.5), text)
    a = model.pass_costs(SHAPE).activations
    assert a.block_forward + a.shared + a.block_input == pytest.approx(live.peak, rel=0.05, abs=4 * latents.nbytes)


def test_ranks_of_a_sequence_share_out_all_but_the_text() -> None:
    model = small("ltx", "bfloat16")
    whole = model.pass_costs(SHAPE)
    shared = model.pass_costs(PassShape(SHAPE.batch, SHAPE.latent_shape, SHAPE.text_tokens, ring=4))
    assert shared.self_attention.forward == whole.self_attention.forward / 4
    assert shared.cross_attention.forward == whole.cross_attention.forward / 4
    assert shared.linear.forward == pytest.approx(whole.linear.forward / 4, rel=0.02)
    assert shared.output_numbers == whole.output_numbers / 4


def test_a_dry_run_counts_the_same_within_its_own_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts a step's FLOPs where a training does, under a tracer that remembers what operations made before."""
    model, tracer = small("ltx", "float32"), Tracer()
    expected = model.pass_costs(SHAPE)
    with FakeTensorMode(allow_non_fake_inputs=True), tracer:
        tracer.begin("a step")
        for _ in range(2):
            monkeypatch.setattr(_traced_costs, "_known", {})
            assert model.pass_costs(SHAPE) == expected
