"""Damage to shards that only a checksum shows."""

from __future__ import annotations

from sgmd_dist.data.index import ShardIndex


def flip_last_bytes(index: ShardIndex, *samples: int) -> None:
    """Flip the bits of each sample's last byte, in its tar."""
    for sample in samples:
        with open(index.paths[index.shard[sample]], "r+b") as file:
            file.seek(int(index.offset[sample]) + int(index.size[sample]) - 1)
            (last,) = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([last ^ 255]))
