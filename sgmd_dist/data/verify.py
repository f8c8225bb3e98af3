"""Read a whole data set and list everything that is wrong with it: tars, samples, indexes, the negative prompt."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path

import torch

from sgmd_dist.data.examine import KIND_IN_WORDS, Kind, describe, read_sample
from sgmd_dist.data.format import (
    NEGATIVE_PROMPT_NAME,
    CorruptSample,
    consolidate_call,
    is_finite,
    read_json,
    read_negative_prompt,
)
from sgmd_dist.data.index import INDEX_NAME, find_duplicates
from sgmd_dist.data.members import Mistake, scan_tar
from sgmd_dist.data.record import ShardRecord, sidecar_path
from sgmd_dist.data.remote_index import expanded
from sgmd_dist.errors import UserError

OnBytes = Callable[[int], None]


@dataclass
class Report:
    """What was found.

    Attributes:
        mistakes: in the order of the shards, then what concerns several of them.
        samples: number of samples read without a mistake, by bucket.
        num_shards, num_bytes: of the tars that are there.
    """

    mistakes: list[Mistake] = field(default_factory=list)
    samples: Counter[str] = field(default_factory=Counter)
    num_shards: int = 0
    num_bytes: int = 0


@dataclass
class _Shard:
    """A tar, what the indexes say of it, and what was found in it."""

    path: Path
    records: dict[str, ShardRecord]  # by the index file's name, the first is the one that training takes
    mistakes: list[Mistake] = field(default_factory=list)
    found: ShardRecord = field(init=False)  # the samples that could be read; of their places what comparing needs
    kinds: dict[str, tuple[str, Kind]] = field(default_factory=dict)  # with the first key of each
    num_good: Counter[str] = field(default_factory=Counter)  # by bucket

    def __post_init__(self) -> None:
        self.found = ShardRecord(self.path.name, 0, "", [], False, 0, [], [], [], [])


def total_bytes(shards: Sequence[str]) -> int:
    """The bytes of all tars that `verify` would read, for a progress bar. Raises `UserError` as `verify`."""
    return sum(path.stat().st_size for path in _tars(shards, {}, []) if path.is_file())


def verify(shards: Sequence[str], *, num_threads: int = 1, on_bytes: OnBytes = lambda _: None) -> Report:
    """Read everything in `shards` (folders, tars, brace patterns of tars) and report every mistake.

    Checked are the tars themselves, every sample's crc32, json, shapes, dtypes and finite values, the indexes against
    the tars and each other, keys over the whole data set, buckets, and the negative prompt. No pickle is executed.

    Args:
        num_threads: shards read at a time.
        on_bytes: called from those threads with the bytes done since its last call.

    Raises:
        UserError: an entry of `shards` names no folder and no tar.
    """
    report = Report()
    indexes: dict[Path, dict[str, ShardRecord]] = {}  # of the folders
    listed = [_with_records(path, indexes, report.mistakes) for path in _tars(shards, indexes, report.mistakes)]
    with ThreadPoolExecutor(num_threads) as threads:
        for shard in threads.map(lambda shard: _verify_shard(shard, on_bytes), listed):
            report.mistakes += shard.mistakes
            report.samples.update(shard.num_good)
    there = [shard for shard in listed if shard.path.is_file()]
    report.num_shards, report.num_bytes = len(there), sum(shard.path.stat().st_size for shard in there)
    report.mistakes += find_duplicates([(shard.path, shard.found) for shard in there])
    report.mistakes += _differing_kinds(there)
    report.mistakes += _negative_prompts(there)
    return report


# ------------------------------------------------------------------------------------------------ what to read


def _tars(shards: Sequence[str], indexes: dict[Path, dict[str, ShardRecord]], mistakes: list[Mistake]) -> list[Path]:
    """The tars of all entries; those that an index.json alone knows are among them. Its content goes to `indexes`."""
    found: dict[Path, None] = {}
    for entry in shards:
        if "://" in entry or entry.startswith("pipe:"):
            raise UserError(f"{entry}: only local folders and tars can be verified; copy the shards to a disk")
        folder = Path(entry)
        if folder.is_dir():
            names = {path.name for path in folder.glob("*.tar")}
            try:
                indexes[folder] = _folder_index(folder)
                names |= set(indexes[folder])
            except UserError as error:
                mistakes.append(Mistake(folder / INDEX_NAME, str(error).removeprefix(f"{folder / INDEX_NAME}: ")))
            if not names:
                raise UserError(f"{folder}: holds no .tar shards; write the data set with launch/prepare.py")
            found |= dict.fromkeys(folder / name for name in sorted(names))
        elif entry.endswith(".tar") or "{" in entry:
            found |= dict.fromkeys(Path(path) for path in expanded(entry, "shards"))
        else:
            raise UserError(f"{entry}: no such folder, and no .tar; give data sets' folders or tars")
    return list(found)


def _folder_index(folder: Path) -> dict[str, ShardRecord]:
    """The records of index.json by the names of their tars."""
    path = folder / INDEX_NAME
    content = read_json(path, consolidate_call(folder))
    values = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(values, list):
        raise UserError(f"{path}: holds no list 'shards'; delete it and {consolidate_call(folder)}")
    records = [ShardRecord.from_json(value, path) for value in values]
    return {record.shard: record for record in records}


def _with_records(path: Path, indexes: dict[Path, dict[str, ShardRecord]], mistakes: list[Mistake]) -> _Shard:
    """A tar with its indexes: its sidecar, and its folder's index.json where the folder is what was named."""
    shard = _Shard(path, {})
    if (consolidated := indexes.get(path.parent)) is not None:
        if path.name in consolidated:
            shard.records[INDEX_NAME] = consolidated[path.name]
        else:
            mend = consolidate_call(path.parent)
            shard.mistakes.append(Mistake(path, f"is not listed in {INDEX_NAME}, which is old; {mend}"))
    sidecar = sidecar_path(path)
    if sidecar.exists():
        try:
            record = ShardRecord.from_json(read_json(sidecar, consolidate_call(path.parent)), sidecar)
            shard.records[sidecar.name] = record
        except UserError as error:
            mistakes.append(Mistake(sidecar, str(error).removeprefix(f"{sidecar}: ")))
    elif not shard.records:
        shard.mistakes.append(Mistake(path, f"has no index; {consolidate_call(path.parent)}"))
    if len(shard.records) == 2 and shard.records[INDEX_NAME] != shard.records[sidecar.name]:
        mend = f"delete the wrong one and {consolidate_call(path.parent)}"
        shard.mistakes.append(Mistake(path, f"{INDEX_NAME} and {sidecar.name} differ; {mend}"))
    return shard


# ------------------------------------------------------------------------------------------------ one shard


def _verify_shard(shard: _Shard, on_bytes: OnBytes) -> _Shard:
    path = shard.path
    record = next(iter(shard.records.values()), None)
    if not path.is_file():
        shard.mistakes.append(Mistake(path, "not found; restore the shard or delete its indexes"))
        return shard
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if record is not None and record.tar_bytes != size:
                what = f"{size} bytes, the index says {record.tar_bytes}: truncated or replaced; restore the shard"
                shard.mistakes.append(Mistake(path, what))
            done = _verify_samples(shard, record, file, on_bytes)
            on_bytes(size - done)
    except OSError as error:
        shard.mistakes.append(Mistake(path, f"cannot be read: {error}"))
    return shard


def _verify_samples(shard: _Shard, record: ShardRecord | None, file: BufferedReader, on_bytes: OnBytes) -> int:
    """Check every sample of the tar; returns the bytes that `on_bytes` was told of."""
    scan, done = scan_tar(shard.path, file), 0
    found = shard.found = replace(shard.found, layout=scan.layout)
    shard.mistakes += scan.mistakes
    if record is not None and record.layout != scan.layout:
        shard.mistakes.append(Mistake(shard.path, f"has layout {scan.layout}, the index says {record.layout}"))
        record = None
    numbers = {key: number for number, key in enumerate(record.keys)} if record is not None else {}
    for key, members in scan.samples.items():
        try:
            sample = read_sample(file, key, members, scan.layout)
        except CorruptSample as error:
            offset = min(member.offset for member in members.values())
            shard.mistakes.append(Mistake(shard.path, str(error), key, offset))
            continue
        place = sample.place
        kind, wrong = describe(sample)
        if record is not None:
            wrong = _index_differences(record, numbers.get(key), place, kind) + wrong
        shard.mistakes += [Mistake(shard.path, what, key, place["offsets"]) for what in wrong]
        found.keys.append(key)
        found.offsets.append(place["offsets"])
        found.crc32.append(place["crc32"])
        if kind is not None:
            shard.kinds.setdefault(str(kind), (key, kind))
        if kind is not None and not wrong:
            shard.num_good[kind.bucket] += 1
        on_bytes(num_bytes := place["sizes"] + place.get("embed_sizes", 0))
        done += num_bytes
    if not scan.samples:
        shard.mistakes.append(Mistake(shard.path, "holds no samples; delete it"))
    if record is None:
        return done
    for key in [key for key in record.keys if key not in scan.samples]:
        what = "is in the index, but not in the tar; restore the shard"
        shard.mistakes.append(Mistake(shard.path, what, key, record.offsets[numbers[key]]))
    if twice := [key for key, count in Counter(record.keys).items() if count > 1]:
        shard.mistakes.append(Mistake(shard.path, "is in the index twice", twice[0]))
    elif record.keys != list(scan.samples) and set(record.keys) == set(scan.samples):
        shard.mistakes.append(Mistake(shard.path, "has its samples in another order than the index"))
    return done


def _index_differences(record: ShardRecord, number: int | None, place: dict[str, int], kind: Kind | None) -> list[str]:
    if number is None:
        return ["is not in the index, which is old"]
    wrong = []
    for name, value in place.items():
        expected = getattr(record, name)[number]
        if value == expected:
            continue
        if name == "crc32":
            wrong.append(f"crc32 is {value:08x}, the index says {expected:08x}: the bytes are damaged")
        else:
            wrong.append(f"{name} is {value}, the index says {expected}")
    expected = tuple(getattr(record, name) for name in Kind._fields)
    if kind is not None and tuple(kind) != expected:
        wrong.append(f"{KIND_IN_WORDS} is {tuple(kind)}, the index says {expected}")
    return wrong


# ------------------------------------------------------------------------------------------------ all shards


def _differing_kinds(shards: list[_Shard]) -> list[Mistake]:
    """Shards of several kinds, samples of one bucket with two latent shapes, and embeddings of two widths."""
    mistakes: list[Mistake] = []
    first: Kind | None = None
    of_bucket: dict[str, Kind] = {}
    for shard in shards:
        for key, kind in shard.kinds.values():
            first = first or kind
            known = of_bucket.setdefault(kind.bucket, kind)
            if kind.embed_dim != first.embed_dim:
                what = f"prompt_embeds have D={kind.embed_dim}, the first sample has D={first.embed_dim}"
                mistakes.append(Mistake(shard.path, f"{what}; encode all with one text encoder", key))
            if kind._replace(embed_dim=0) != known._replace(embed_dim=0):
                what = f"bucket '{kind.bucket}' has {KIND_IN_WORDS} {tuple(kind)}, samples before {tuple(known)}"
                mistakes.append(Mistake(shard.path, f"{what}; give every kind its own bucket name", key))
        if len(shard.kinds) > 1:
            what = f"holds samples of {len(shard.kinds)} kinds; put samples of one kind into one shard"
            mistakes.append(Mistake(shard.path, what))
    return mistakes


def _negative_prompts(shards: list[_Shard]) -> list[Mistake]:
    """One folder at least has the negative prompt; all that have one have the same, of the samples' width."""
    folders = list(dict.fromkeys(shard.path.parent for shard in shards))
    widths = {kind.embed_dim for shard in shards for _, kind in shard.kinds.values()}
    mistakes, first = [], None
    for folder in folders:
        path = folder / NEGATIVE_PROMPT_NAME
        try:
            embeds = read_negative_prompt(folder)
        except UserError as error:
            if path.exists() or folder == folders[-1] and first is None:
                mistakes.append(Mistake(path, str(error).removeprefix(f"{path}: ")))
            continue
        if not is_finite(embeds):
            mistakes.append(Mistake(path, "holds values that are not finite; write it again"))
        if widths and embeds.shape[1] not in widths:
            mistakes.append(
                Mistake(path, f"D={embeds.shape[1]}, the shards have D={min(widths)}; encode it with theirs")
            )
        if first is not None and not torch.equal(first[1], embeds):
            mistakes.append(Mistake(path, f"differs from {first[0]}'s; use one for all"))
        first = first or (folder, embeds)
    return mistakes
