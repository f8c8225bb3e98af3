"""How tokens lie on the ranks of a sequence, what they exchange, and how ring attention joins its parts."""

from __future__ import annotations

import pytest
import torch

from sgmd_dist.parallel.ring import merge
from sgmd_dist.parallel.sequence import Partition, SequenceAxis, traffic
from sgmd_kernels.attention import attention_forward

WAN_14B = {"heads": 40, "head_size": 128, "item_bytes": 2}


@pytest.mark.parametrize(
    "length, ring, ulysses, run, padding, chunks",
    [
        (32760, 1, 1, 32760, 0, [32760]),
        (32760, 2, 4, 4095, 0, [16380, 16380]),
        (27, 1, 4, 7, 1, [27]),
        (27, 4, 1, 7, 1, [7, 7, 7, 6]),
        (45, 2, 2, 12, 3, [24, 21]),
        (2, 4, 1, 1, 2, [1, 1, 0, 0]),
        (1, 2, 3, 1, 5, [1, 0]),
    ],
)
def test_runs_are_equal_and_only_the_end_is_padding(length, ring, ulysses, run, padding, chunks) -> None:
    partition = Partition(length, ring, ulysses)
    assert (partition.run, partition.padding, partition.chunk_lengths()) == (run, padding, chunks)
    assert sum(chunks) == length
    assert partition.run * partition.size == length + padding


def test_one_rank_sends_nothing() -> None:
    for sent in traffic(Partition(1000, 1, 1), batch=1, **WAN_14B):
        assert (sent.all_to_alls, sent.hops, sent.sent_bytes) == (0, 0, 0)


def test_ulysses_sends_four_tensors_less_the_own_share_each_way() -> None:
    forward, backward = traffic(Partition(32760, 1, 8), batch=1, **WAN_14B)
    assert forward == backward
    assert (forward.all_to_alls, forward.hops) == (2, 0)
    assert forward.sent_bytes == 4 * 4095 * 40 * 128 * 7 // 8 * 2


def test_heads_that_do_not_divide_are_sent_as_padding() -> None:
    three, four = (traffic(Partition(64, 1, 4), batch=1, heads=n, head_size=8, item_bytes=4) for n in (3, 4))
    assert three == four


def test_a_ring_sends_keys_and_values_once_less_than_it_has_ranks_and_gradients_home() -> None:
    forward, backward = traffic(Partition(30, 3, 1), batch=2, heads=5, head_size=8, item_bytes=2)
    numbers = 2 * 10 * 5 * 8
    assert (forward.all_to_alls, forward.hops, forward.sent_bytes) == (0, 2, 2 * numbers * 2 * 2)
    assert (backward.all_to_alls, backward.hops) == (0, 2 + 3)
    assert backward.sent_bytes == 2 * numbers * 2 * 2 + 2 * numbers * 3 * 4


@pytest.mark.parametrize("lengths", [(3, 4), (1, 1, 9), (5, 2, 3, 1)])
def test_parts_merge_to_attention_over_all_keys(lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    num_keys = sum(lengths)
    q, k, v = (torch.randn(2, n, 3, 8, generator=generator, dtype=torch.float64) for n in (6, num_keys, num_keys))
    k = k * 8  # some parts hold nearly all of the weight
    parts = [
        attention_forward(q, *pair) for pair in zip(k.split(list(lengths), 1), v.split(list(lengths), 1), strict=True)
    ]
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = merge(out, lse, *part)
    expected_out, expected_lse = attention_forward(q, k, v)
    assert torch.allclose(out, expected_out, atol=1e-13) and torch.allclose(lse, expected_lse, atol=1e-13)


def test_parts_far_apart_merge_without_overflow() -> None:
    out, lse = torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), 500.0)
    part, part_lse = torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -500.0)
    merged, merged_lse = merge(out.clone(), lse, part, part_lse)
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
    merged, merged_lse = merge(part.clone(), part_lse, out, lse)
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse)


def test_without_a_group_nothing_is_split() -> None:
    axis, x = SequenceAxis(None), torch.randn(1, 5, 2, 8)
    assert axis.size == 1
    assert axis.split(x, 1) is x
    assert axis.gather(x, 1, 5) is x
    assert torch.equal(axis.self_attention(x, x, x, 5), axis.cross_attention(x, x, x))
