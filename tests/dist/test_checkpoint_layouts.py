"""A checkpoint holds the run and nothing of the ranks that saved it: any number of ranks reads the same bits."""

from __future__ import annotations

from pathlib import Path

from checkpoint_cases import Axes, relay
from ranks import run_ranks

from sgmd_dist import checkpoint

CHAIN: list[tuple[int, Axes]] = [
    (1, {}),
    (2, {}),
    (4, {}),
    (4, {"dp_replicate": 2}),
    (2, {}),
    (4, {"ring": 2, "ulysses": 2}),
    (4, {"dp_replicate": 2, "ulysses": 2}),
    (1, {}),
]


def test_the_bits_survive_every_change_of_ranks_and_layout(tmp_path: Path) -> None:
    """Each part of the chain loads what the one before saved, compares all of it, and saves other numbers."""
    for step, (num_ranks, axes) in enumerate(CHAIN):
        shards = run_ranks(num_ranks, relay, tmp_path, step, axes, step % 2 == 1)
        if num_ranks == 4 and not axes:
            assert shards[3][2] == 0, "a rank without a row of the smallest layer"
    found = checkpoint.committed(tmp_path)
    assert [checkpoint.read_meta(path).step for path in found] == list(range(len(CHAIN)))
    assert [inspection.wrong for inspection in checkpoint.inspect(tmp_path)] == [None] * len(CHAIN)
