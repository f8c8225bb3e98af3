"""A digest of a model folder's content that does not read all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_WHOLE_BYTES = 8 * 2**20  # configurations, vocabularies and small weights; larger files are sampled
_NUM_SAMPLES, _SAMPLE_BYTES = 256, 4096


def content_digest(folders: Iterable[Path]) -> str:
    """sha256 of all files below `folders`: their names, sizes and bytes; not of the folders' places or any times.

    Of a file of more than 8 MiB it takes the first MiB, where safetensors have their header, and 256 blocks of 4 KiB
    spread evenly to its end: another training of the same network changes all of them.
    """
    digest = hashlib.sha256()
    for number, folder in enumerate(folders):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            size = path.stat().st_size
            digest.update(f"{number}\0{path.relative_to(folder)}\0{size}\0".encode())
            with open(path, "rb") as file:
                if size <= _WHOLE_BYTES:
                    digest.update(file.read())
                    continue
                digest.update(file.read(2**20))
                for sample in range(_NUM_SAMPLES):
                    file.seek((size - _SAMPLE_BYTES) * sample // (_NUM_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
