"""What `parallelize` refuses, and the attention that it puts in."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from sgmd_dist.assemble import materialize
from sgmd_dist.errors import UserError
from sgmd_dist.layout import Layout
from sgmd_dist.models.wan import Wan, WanConfig
from sgmd_dist.parallel.apply import parallelize
from sgmd_dist.parallel.mesh import build_mesh
from sgmd_dist.recipe import AttentionBackend, ParallelSection
from sgmd_kernels.attention import AUTO, ORDER

ONE_RANK = Layout(world_size=1, dp_replicate=1, dp_shard=1, ring=1, ulysses=1, num_units=1, accumulation=1)


def tiny_wan() -> Wan:
    config = WanConfig(num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2)
    return Wan(config.model_dump(), None, [], False, torch.float32)


def apply(device: torch.device, **keys) -> torch.nn.Module:
    model = tiny_wan()
    with torch.device("meta"):
        module = model.build()
    mesh = build_mesh(ONE_RANK, device)
    return parallelize(module, model, ParallelSection(**keys), mesh=mesh, compute_dtype=torch.float32)


def test_a_backend_that_cannot_run_here_is_named_with_those_that_can(alone: torch.device) -> None:
    if alone.type == "cuda":
        pytest.skip("for machines without a CUDA device")
    with pytest.raises(UserError) as raised:
        apply(alone, attention="flash_attn_3")
    message = str(raised.value)
    assert message.startswith("parallel.attention = flash_attn_3: ")
    assert "needs a CUDA device" in message and "Would run: flash, math" in message


def test_every_attention_of_every_block_goes_through_the_axis(alone: torch.device) -> None:
    module = apply(alone, attention="math")
    processors = {id(attn.processor) for block in module.blocks for attn in (block.attn1, block.attn2)}
    assert len(processors) == 1
    assert type(module.blocks[0].attn1.processor).__module__ == "sgmd_dist.models._wan_attention"


def test_buffers_are_made_anew_in_place_so_that_hooks_stay(alone: torch.device) -> None:
    module = apply(alone)
    rope = module.rope
    materialize(module, tiny_wan(), alone)
    fresh = tiny_wan().build().rope
    assert module.rope is rope and rope._forward_hooks
    assert torch.equal(rope.freqs_cos, fresh.freqs_cos) and torch.equal(rope.freqs_sin, fresh.freqs_sin)


def test_the_recipe_knows_every_backend() -> None:
    assert get_args(AttentionBackend) == (AUTO, *ORDER)
