"""Checkpointing and compilation of blocks, together: what is run again, and that gradients do not change."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sgmd_dist.parallel.recompute import recompute_all_but_attention, recompute_block
from sgmd_kernels.attention import attention


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.runs += 1
        return self.layer(x).sin()


@pytest.mark.parametrize("checkpointed, runs", [(False, 1), (True, 2)])
def test_a_checkpointed_block_runs_again_in_the_backward_pass(checkpointed: bool, runs: int):
    block = Block()
    if checkpointed:
        recompute_block(block)
    block(torch.ones(2, 3)).sum().backward()
    assert block.runs == runs
    assert set(dict(block.named_parameters())) == {"layer.weight", "layer.bias"}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_checkpointed_block_is_compiled(checkpointed: bool):
    """torch.compile passes over what it cannot see into without a word."""
    torch.manual_seed(0)
    block, graphs = Block(), []
    block(x := torch.ones(2, 3)).sum().backward()
    eager = [parameter.grad for parameter in block.parameters()]
    block.zero_grad()
    if checkpointed:
        recompute_block(block)
    block.compile(backend=lambda module, inputs: graphs.append(module) or module.forward)
    block(x).sum().backward()
    assert len(graphs) == 1
    torch.testing.assert_close([parameter.grad for parameter in block.parameters()], eager)


class AttentionBlock(nn.Module):
    """Self-attention over 5 tokens, attention over 3 others, and a linear layer; counts how often each runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.linear_runs = 0
        self.layer.register_forward_hook(lambda *_: setattr(self, "linear_runs", self.linear_runs + 1))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q = self.layer(x).unflatten(-1, (2, 2))
        x = attention(q, q, q)
        return attention(x, context, context).sin()


class Calls(TorchDispatchMode):
    """The shapes of keys that each call of the attention operator had."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[int] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.sgmd_kernels.attention.default:
            self.keys.append(args[1].shape[1])
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "recompute, linear_runs, keys",
    [(None, 1, [5, 3]), (recompute_block, 2, [5, 3, 5, 3]), (recompute_all_but_attention, 2, [5, 3, 3])],
)
def test_selective_checkpointing_runs_all_again_but_self_attention(recompute, linear_runs: int, keys: list[int]):
    torch.manual_seed(0)
    block = AttentionBlock()
    x, context = torch.randn(1, 5, 4, requires_grad=True), torch.randn(1, 3, 2, 2)
    expected = torch.autograd.grad(block(x, context).sum(), [x, *block.parameters()])
    block.linear_runs = 0
    if recompute is not None:
        recompute(block)
    with Calls() as calls:
        found = torch.autograd.grad(block(x, context).sum(), [x, *block.parameters()])
    assert (block.linear_runs, calls.keys) == (linear_runs, keys)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
