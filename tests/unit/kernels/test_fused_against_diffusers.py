"""The fused operations' references against what diffusers' Wan block and this project's SGMD objective compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_wan
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from torch import Tensor

from sgmd_dist.objectives.sgmd import fisher_loss, nr_loss
from sgmd_kernels.adaln import adaln
from sgmd_kernels.qk_rope import rms_norm_rope
from sgmd_kernels.residual import gated_residual
from sgmd_kernels.sgmd_loss import outer_loss

HEADS, HEAD, EPS = 3, 12, 1e-6
WIDTH = HEADS * HEAD
GRID = (2, 3, 2)  # frames, height and width in patches of 1 x 1 x 1
LENGTH = 12

# Largest error over largest value: float32 differs by the order of sums. In bfloat16 both round the same float32
# numbers once, so at most one unit in the last place; diffusers rounds between norm and rotation, which the fused
# operation does not: one more.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
ROPE_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-6}


def relative(one: Tensor, other: Tensor) -> float:
    assert one.dtype == other.dtype and one.shape == other.shape
    return ((one.double() - other.double()).abs().max() / other.double().abs().max()).item()


def block(dtype: torch.dtype) -> WanTransformerBlock:
    torch.manual_seed(0)
    made = WanTransformerBlock(WIDTH, 48, HEADS, eps=EPS, cross_attn_norm=True)
    for attention in (made.attn1, made.attn2):
        for norm in (attention.norm_q, attention.norm_k):
            torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    made.to(dtype)
    # As Wan is loaded: `_keep_in_fp32_modules`.
    made.scale_shift_table.data = made.scale_shift_table.float()
    made.norm2.float()
    return made


class Recorded:
    """What goes into and comes out of a block's parts in one forward."""

    def __init__(self, wan_block: WanTransformerBlock, temb: Tensor, dtype: torch.dtype, patch: pytest.MonkeyPatch):
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        for name in ("norm1", "attn1", "norm2", "norm3", "ffn"):
            getattr(wan_block, name).register_forward_hook(self._keep(name))
        self.query, self.key = None, None
        original = transformer_wan.dispatch_attention_fn

        def attention(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
            if self.query is None:
                self.query, self.key = query, key
            return original(query, key, value, **kwargs)

        patch.setattr(transformer_wan, "dispatch_attention_fn", attention)
        self.tables = WanRotaryPosEmbed(HEAD, (1, 1, 1), 16)(torch.empty(1, 1, *GRID))
        hidden, text = torch.randn(2, LENGTH, WIDTH).to(dtype), torch.randn(2, 5, WIDTH).to(dtype)
        self.result = wan_block(hidden, text, temb.to(dtype), self.tables)

    def _keep(self, name: str):
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.inputs[name], self.outputs[name] = args[0], output

        return hook


@pytest.fixture(params=["a timestep per sample", "a timestep per token"])
def temb(request: pytest.FixtureRequest) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 6, WIDTH) if request.param == "a timestep per sample" else torch.randn(2, LENGTH, 6, WIDTH)


def chunks(wan_block: WanTransformerBlock, temb: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """shift, scale and gate of self-attention, then of the feed-forward: `[B, 1, D]` or `[B, L, D]`."""
    table = wan_block.scale_shift_table + temb.to(dtype).float()
    return tuple(part.squeeze(-2) if temb.dim() == 4 else part for part in table.chunk(6, dim=-2))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_adaln_and_gated_residual_are_those_of_the_block(
    temb: Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    wan_block = block(dtype)
    seen = Recorded(wan_block, temb, dtype, monkeypatch)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = chunks(wan_block, temb, dtype)
    hidden, before_ffn = seen.inputs["norm1"].to(dtype), seen.inputs["norm3"].to(dtype)
    found = {
        "adaln": relative(adaln(hidden, scale, shift, eps=EPS), seen.inputs["attn1"]),
        "residual": relative(gated_residual(hidden, seen.outputs["attn1"], gate), seen.inputs["norm2"].to(dtype)),
        "adaln of ffn": relative(adaln(before_ffn, ffn_scale, ffn_shift, eps=EPS), seen.inputs["ffn"]),
        "residual of ffn": relative(gated_residual(before_ffn, seen.outputs["ffn"], ffn_gate), seen.result),
    }
    assert max(found.values()) <= TOLERANCE[dtype], found


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_rope_is_that_of_the_attention_processor(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    wan_block = block(dtype)
    seen = Recorded(wan_block, torch.randn(2, 6, WIDTH), dtype, monkeypatch)
    cos, sin = (table[0, :, 0, ::2] for table in seen.tables)
    attention = wan_block.attn1
    for norm, projection, expected in (
        (attention.norm_q, attention.to_q, seen.query),
        (attention.norm_k, attention.to_k, seen.key),
    ):
        assert expected is not None
        got = rms_norm_rope(projection(seen.inputs["attn1"]), norm.weight, cos, sin, eps=EPS)
        assert relative(got, expected.flatten(2)) <= ROPE_TOLERANCE[dtype]


@pytest.mark.parametrize("fisher_weight, nr_weight", [(1.0, 0.1), (0.0, 0.5), (0.7, 0.0)])
def test_outer_loss_is_the_objective_s_with_its_gradient(fisher_weight: float, nr_weight: float):
    torch.manual_seed(2)
    x0_teacher, x_g = torch.randn(2, 3, 4, 2, 5, 3, dtype=torch.float64)
    x0_fake = torch.randn_like(x_g).requires_grad_()
    n, sigma = torch.rand(2, 3, dtype=torch.float64)
    sigma[0] = 0  # clamped
    n[1] = 0
    fisher, nr = fisher_loss(x0_fake, x0_teacher, n), nr_loss(x0_fake, x_g, sigma)
    expected = fisher_weight * fisher - nr_weight * nr
    got = outer_loss(x0_fake, x0_teacher, x_g, n, sigma, fisher_weight=fisher_weight, nr_weight=nr_weight)
    per_sample = torch.randn(3, dtype=torch.float64)
    (want,) = torch.autograd.grad(expected, x0_fake, per_sample)
    (gradient,) = torch.autograd.grad(got.loss, x0_fake, per_sample)
    for ours, theirs in ((got.loss, expected), (got.fisher, fisher), (got.nr, nr), (gradient, want)):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
