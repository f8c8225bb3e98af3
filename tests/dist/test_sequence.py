"""Sequence parallelism equals one process: output, input gradient and every weight gradient, in float32."""

from __future__ import annotations

import gc
from functools import cache

import pytest
import torch
from ranks import run_ranks
from sequence_cases import (
    BATCH,
    HEAD_SIZE,
    Case,
    Outcome,
    communication,
    parallel,
    parallel_in_graphs,
    parallel_with_own_gradients,
    plain,
)
from torch import Tensor

from sgmd_dist.parallel.mesh import SequenceGroup, build_mesh, process_group
from sgmd_dist.parallel.sequence import Partition, SequenceAxis, agree, traffic

TOLERANCE = 1e-6

CASES = {
    "one rank": Case(),
    "ulysses 2": Case(ulysses=2),
    "ulysses 2, 3 heads": Case(ulysses=2, heads=3, length=45),
    "ulysses 2, timesteps per token, checkpointing": Case(ulysses=2, per_token=True, checkpointing=True),
    "ulysses 2, chained": Case(ulysses=2, chained=True),
    "ulysses 2, math": Case(ulysses=2, attention="math"),
    "ring 2": Case(ring=2),
    "ring 2, 45 tokens, checkpointing": Case(ring=2, length=45, checkpointing=True),
    "ring 2, chained": Case(ring=2, chained=True),
    "ring 2, math": Case(ring=2, attention="math"),
    "ulysses 3": Case(ulysses=3, length=45, heads=5),
    "ulysses 3, even length": Case(ulysses=3, length=24, heads=3),
    "ring 3": Case(ring=3, heads=3),
    "ring 3, timesteps per token": Case(ring=3, per_token=True, length=45),
    "ring 3, two tokens": Case(ring=3, length=2),
    "ring 3, chained, checkpointing": Case(ring=3, chained=True, checkpointing=True, length=45),
    "ulysses 4, 3 heads": Case(ulysses=4, heads=3),
    "ulysses 4, one token": Case(ulysses=4, length=1),
    "ring 4": Case(ring=4, length=45, heads=5, per_token=True),
    "ring 4, one token": Case(ring=4, length=1),
    "ulysses 2 x ring 2": Case(ulysses=2, ring=2, heads=3, length=45),
    "ulysses 2 x ring 2, timesteps per token": Case(ulysses=2, ring=2, heads=5, per_token=True, checkpointing=True),
    "ulysses 2 x ring 2, chained": Case(ulysses=2, ring=2, chained=True),
    "ulysses 2 x ring 2, one token": Case(ulysses=2, ring=2, length=1),
    "dp 2 x ulysses 2": Case(dp_shard=2, ulysses=2, chained=True),
    "dp 2 x ring 2": Case(dp_shard=2, ring=2, length=45, checkpointing=True),
    "HSDP 2 x ulysses 2": Case(dp_replicate=2, ulysses=2, heads=3, checkpointing=True),
    "HSDP 2 x ring 2": Case(dp_replicate=2, ring=2, per_token=True),
}


@cache
def outcomes(world_size: int) -> dict[Case, list[Outcome]]:
    """Every case of so many ranks, run in one go: outcomes by rank."""
    cases = [case for case in CASES.values() if case.world_size == world_size]
    by_rank = run_ranks(world_size, parallel, cases)
    return {case: [rank[i] for rank in by_rank] for i, case in enumerate(cases)}


def check(case: Case, found: list[Outcome]) -> None:
    """Compare each rank with its part of the plain run; the input gradient is the group's mean."""
    expected, sharers = plain(case), case.ring * case.ulysses
    for part, outcome in enumerate(expected):
        group = found[part * sharers : (part + 1) * sharers]
        for rank in group:
            assert largest(rank.output, outcome.output) < TOLERANCE
        mean = torch.stack([rank.input_gradient for rank in group]).mean(0)
        assert largest(mean, outcome.input_gradient) < TOLERANCE
    gradients = expected[0].weight_gradients
    assert found[0].weight_gradients.keys() == gradients.keys()
    errors = {name: largest(found[0].weight_gradients[name], gradient) for name, gradient in gradients.items()}
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}
    if case.length > 2:  # one or two tokens leave attention little to do
        assert min(float(gradient.abs().max()) for gradient in gradients.values()) > 100 * TOLERANCE


def largest(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process(name: str) -> None:
    case = CASES[name]
    check(case, outcomes(case.world_size)[case])


def test_a_gather_that_does_not_sum_shows_where_networks_are_chained() -> None:
    """One network alone does not tell: all ranks have the same loss of the gathered output."""
    cases = [Case(ulysses=2), Case(ulysses=2, chained=True)]
    alone, chained = run_ranks(2, parallel_with_own_gradients, cases)[0]
    for case, outcome, fails in ((cases[0], alone, False), (cases[1], chained, True)):
        expected = plain(case)[0].weight_gradients
        worst = max(largest(outcome.weight_gradients[name], gradient) for name, gradient in expected.items())
        assert (worst > 1000 * TOLERANCE) == fails, worst


def test_compiled_blocks_equal_one_process() -> None:
    """As far as graphs go, with their backward passes: test_training_equality.py has Inductor make kernels of them."""
    case = Case(ulysses=2, compile=True, checkpointing=True)
    ranks = run_ranks(case.world_size, parallel_in_graphs, [case])
    check(case, [outcomes[0] for outcomes, _ in ranks])
    assert all(num_graphs > 0 for _, num_graphs in ranks)


@pytest.mark.parametrize(
    "case",
    [
        Case(ulysses=2),
        Case(ulysses=3, heads=5, checkpointing=True),
        Case(ring=3),
        Case(ulysses=2, ring=2, checkpointing=True),
    ],
    ids=["ulysses 2", "ulysses 3, recomputed", "ring 3", "hybrid, recomputed"],
)
def test_a_block_communicates_what_the_formula_says(case: Case) -> None:
    """Two blocks; a recomputed block repeats its forward's exchange in the backward pass."""
    num_blocks = 2
    partition = Partition(case.length, case.ring, case.ulysses)
    forward, backward = traffic(partition, batch=BATCH, heads=case.heads, head_size=HEAD_SIZE, item_bytes=4)
    repeated = int(case.checkpointing)
    for in_forward, in_backward in run_ranks(case.world_size, communication, case):
        for found, (one, more) in {in_forward: (forward, 0), in_backward: (backward, repeated)}.items():
            hops = num_blocks * (one.hops + more * forward.hops)
            assert found.all_to_alls == num_blocks * (one.all_to_alls + more * forward.all_to_alls)
            assert (found.sends, found.receives) == (hops, hops)
            assert found.sent_bytes == num_blocks * (one.sent_bytes + more * forward.sent_bytes)


def sums(case: Case) -> dict[str, list[float]]:
    """Which ranks are in one's groups, seen by a sum of powers of two over each."""
    with process_group() as device:
        mesh = build_mesh(case.layout(), device)
        group = mesh.sequence
        assert group is not None
        found = {}
        for name in ("whole", "ring_name", "ulysses_name"):
            axis = SequenceAxis(SequenceGroup(0, 1, 2, getattr(group, name), "", ""))
            flag = torch.tensor([float(2**mesh.rank)]).view(1, 1)
            found[name] = sorted(axis.gather(flag, 0, 2 if name != "whole" else 4)[:, 0].tolist())
        del mesh
        gc.collect()
        return {**found, "rank": [group.rank]}


def test_tokens_follow_the_ranks_and_the_groups_are_rows_and_columns() -> None:
    ranks = run_ranks(4, sums, Case(ulysses=2, ring=2))
    assert [r["rank"] for r in ranks] == [[0], [1], [2], [3]]
    assert [r["whole"] for r in ranks] == [[1, 2, 4, 8]] * 4
    assert [r["ulysses_name"] for r in ranks] == [[1, 2], [1, 2], [4, 8], [4, 8]]
    assert [r["ring_name"] for r in ranks] == [[1, 4], [2, 8], [1, 4], [2, 8]]


def agreed() -> tuple[list[bool], list[bool]]:
    with process_group() as device:
        mesh = build_mesh(Case(ring=2).layout(), device)
        valid = torch.tensor([True, mesh.rank == 0, False])
        return agree(valid, 7, mesh.sequence).tolist(), agree(valid, 7, None).tolist()


def test_a_sample_counts_where_every_rank_of_the_group_could_read_it() -> None:
    first, second = run_ranks(2, agreed)
    assert first == ([True, False, False], [True, True, False])
    assert second == ([True, False, False], [True, False, False])
