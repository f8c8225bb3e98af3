"""Checkpointing and compilation of blocks, together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sgmd_dist.parallel.apply import _checkpoint


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
        _checkpoint(block)
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
        _checkpoint(block)
    block.compile(backend=lambda module, inputs: graphs.append(module) or module.forward)
    block(x).sum().backward()
    assert len(graphs) == 1
    torch.testing.assert_close([parameter.grad for parameter in block.parameters()], eager)
