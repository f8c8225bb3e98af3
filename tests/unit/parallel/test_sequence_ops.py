"""The collectives of sequence parallelism as torch operators, on a group of one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import opcheck

from sgmd_dist.parallel.sequence import SequenceAxis  # noqa: F401 (registers the operators)

ops = torch.ops.sgmd_dist


@pytest.fixture
def group(alone: torch.device) -> str:
    return dist.group.WORLD.group_name


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_all_to_all(group: str) -> None:
    opcheck(ops.all_to_all.default, (numbers(1, 3, 4), group))
    opcheck(ops.all_to_all.default, (numbers(1, 3, 4).transpose(1, 2), group))


def test_all_gather(group: str) -> None:
    opcheck(ops.all_gather.default, (numbers(2, 3), group))


def test_reduce_scatter(group: str) -> None:
    opcheck(ops.reduce_scatter.default, (numbers(1, 2, 3).detach(), group))
    x = numbers(1, 2, 3).detach()
    assert torch.equal(ops.reduce_scatter(x.bfloat16(), group), x[0].bfloat16())


def test_the_backward_of_a_gather_is_the_sum_for_this_rank(group: str) -> None:
    x = numbers(2, 3)
    weight = torch.arange(6.0).view(1, 2, 3)
    (ops.all_gather(x, group) * weight).sum().backward()
    assert torch.equal(x.grad, weight[0])
