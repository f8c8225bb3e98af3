"""What a killed writer leaves behind: cut anywhere, its whole samples become a shard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sgmd_dist.data.examine import build_index
from sgmd_dist.data.shards import ShardWriter, salvage
from sgmd_dist.errors import UserError

REPO = Path(__file__).parents[3]
SHAPE = (1, 1, 4, 4)
NAME = "s-000000.tar"


def write(folder: Path, count: int) -> Path:
    """A whole shard of `count` samples."""
    with ShardWriter(folder, latent_shape=SHAPE, bucket="b", prefix="s") as writer:
        for number in range(count):
            generator = torch.Generator().manual_seed(number)
            latents = torch.randn(SHAPE, generator=generator)
            writer.add(f"k{number}", torch.randn(2, 3, generator=generator), f"caption {number}", latents=latents)
    return folder / NAME


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("whole"), 5)


def ends(whole: Path) -> list[int]:
    """Where each sample of the whole shard ends in the tar, in bytes."""
    record = build_index(whole)
    return [-(-(offset + size) // 512) * 512 for offset, size in zip(record.offsets, record.sizes, strict=True)]


def test_cut_at_any_byte_the_samples_before_are_kept(tmp_path: Path, whole: Path) -> None:
    content = whole.read_bytes()
    for cut in range(0, len(content), 257):
        left = tmp_path / f"{NAME}.tmp"
        left.write_bytes(content[:cut])
        kept = sum(end <= cut for end in ends(whole))
        final = salvage(left)
        assert not left.exists()
        if kept == 0:
            assert final is None and not (tmp_path / NAME).exists()
            continue
        assert final == tmp_path / NAME
        found, expected = build_index(final), build_index(write(tmp_path / f"{cut}", kept))
        assert (found.keys, found.offsets, found.crc32) == (expected.keys, expected.offsets, expected.crc32)
        final.unlink()


def test_bytes_that_never_reached_the_disk_end_it(tmp_path: Path, whole: Path) -> None:
    """After a loss of power a file may have its length and zeros where data should be."""
    content, third = bytearray(whole.read_bytes()), ends(whole)[2]
    content[third - 520 : third] = bytes(520)
    left = tmp_path / f"{NAME}.tmp"
    left.write_bytes(content)
    final = salvage(left)
    assert final is not None and build_index(final).keys == ["k0", "k1"]


def test_a_shard_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, latent_shape=SHAPE, bucket="b", prefix="s") as writer:
        writer.add("k0", torch.zeros(2, 3), "caption", latents=torch.zeros(SHAPE))
        with pytest.raises(UserError, match=r"s-000000\.tar\.tmp: another process writes this shard"):
            salvage(tmp_path / f"{NAME}.tmp")
    assert build_index(tmp_path / NAME).keys == ["k0"]


def test_a_killed_process_loses_only_what_it_had_not_handed_over(tmp_path: Path) -> None:
    script = """
import os, signal, sys, torch
from sgmd_dist.data.shards import ShardWriter
with ShardWriter(sys.argv[1], latent_shape=(1, 1, 64, 64), bucket="b", prefix="s") as writer:
    for number in range(6):
        writer.add(f"k{number}", torch.zeros(2, 8), "x", latents=torch.zeros(1, 1, 64, 64))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=REPO, timeout=120, check=False)
    assert killed.returncode == -9
    final = salvage(tmp_path / f"{NAME}.tmp")
    assert final is not None and build_index(final).keys[:4] == ["k0", "k1", "k2", "k3"]
    sample = json.loads(final.read_bytes()[512:].partition(b"\0")[0])
    assert sample["crc32"] == build_index(final).crc32[0]
