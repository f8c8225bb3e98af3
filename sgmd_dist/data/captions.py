"""Captions and their embeddings out of shards, one sample at a time: for preparations that begin with shards."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from io import BufferedReader
from pathlib import Path

from torch import Tensor

from sgmd_dist.data.examine import RawSample, read_sample, tensors_of
from sgmd_dist.data.format import CorruptSample
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.members import TarScan, whole_scan
from sgmd_dist.errors import UserError

_KEPT_SCANS = 16


class StoredCaptions:
    """Reads captions of a data set in any order. Training reads no captions, so their places are in no index."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._scans: OrderedDict[int, TarScan] = OrderedDict()  # of the shards used last

    def read(self, sample: int) -> tuple[str, Tensor]:
        """The caption of a sample, empty where its shard keeps none, and its `prompt_embeds` `[n_tokens, D]` bf16.

        Raises:
            UserError: it cannot be read; the message names the shard, the key and the offset.
        """
        index = self._index
        path, key = index.paths[index.shard[sample]], index.keys[sample]
        try:
            raw = self._raw(int(index.shard[sample]), key)
            if raw.place["crc32"] != index.crc32[sample]:
                raise CorruptSample("its crc32 is not the index's: the bytes are damaged")
            return _caption(raw), tensors_of(raw)["prompt_embeds"]
        except (OSError, KeyError, CorruptSample) as error:
            raise UserError(
                f"{path}: sample '{key}' at offset {index.offset[sample]}: {error}; restore the shard (python"
                " launch/prepare.py verify lists all that is wrong)"
            ) from error

    def _raw(self, shard: int, key: str) -> RawSample:
        with os.fdopen(self._index.open_shard(shard), "rb") as file:
            scan = self._scan(shard, file)
            return read_sample(file, key, scan.samples[key], scan.layout)

    def _scan(self, shard: int, file: BufferedReader) -> TarScan:
        if shard not in self._scans:
            while len(self._scans) >= _KEPT_SCANS:
                self._scans.popitem(last=False)
            self._scans[shard] = whole_scan(Path(str(self._index.paths[shard])), file)
        self._scans.move_to_end(shard)
        return self._scans[shard]


def _caption(raw: RawSample) -> str:
    content = {} if raw.description is None else json.loads(raw.description)
    return str(content.get("caption", ""))
