"""The indexes of shards that lie elsewhere: of a folder, beside each tar, or made from a tar that has none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import braceexpand

from sgmd_dist.data.cache import ShardCache
from sgmd_dist.data.format import NEGATIVE_PROMPT_NAME
from sgmd_dist.data.record import ShardRecord
from sgmd_dist.data.remote import Remote, RemoteMissing, is_remote, redacted
from sgmd_dist.errors import UserError

INDEX_NAME = "index.json"
_AT_ONCE = 8  # small files in flight: their time is the network's latency


def open_remote(entry: str, cache: ShardCache) -> list[tuple[Remote, ShardRecord]]:
    """The shards that an entry of data.shards stands for: the address of a folder, of a tar, or a pattern of these.

    A folder's `index.json` says what it holds. A tar's record is its sidecar; where there is none, as with every
    command, the tar is fetched whole into the cache and read.

    Raises:
        UserError: an index is missing, damaged or cannot be had, or a shard is larger than the cache.
    """
    remotes = [Remote(url) for url in expanded(entry)]
    with ThreadPoolExecutor(min(_AT_ONCE, len(remotes)), thread_name_prefix="shard-index") as threads:
        found = list(threads.map(lambda remote: _open_one(remote, cache), remotes))
    shards = [shard for part in found for shard in part]
    for remote, record in shards:
        cache.check_budget(remote, record.tar_bytes)
    return shards


def expanded(entry: str, key: str = "data.shards") -> list[str]:
    """The addresses or paths of a brace pattern. Raises `UserError` for unbalanced braces.

    A command keeps its backslashes.
    """
    try:
        return list(braceexpand.braceexpand(entry, escape=not is_remote(entry)))
    except ValueError:
        raise UserError(
            f"{key}: '{redacted(entry)}': unbalanced braces; a pattern is written shard-{{000..099}}.tar"
        ) from None


def read_remote_prompt(folder: Remote, cache: ShardCache) -> bytes | None:
    """The bytes of a folder's negative prompt, or None where there is none that we may read."""
    try:
        return cache.read(folder.inside(NEGATIVE_PROMPT_NAME))
    except RemoteMissing:
        return None


def _open_one(remote: Remote, cache: ShardCache) -> Sequence[tuple[Remote, ShardRecord]]:
    if not remote.is_shard:
        return _folder(remote, cache)
    sidecar = None if remote.is_pipe else remote.sidecar()
    if sidecar is not None:
        try:
            return [(remote, _record(_json(cache.read(sidecar), sidecar), sidecar))]
        except RemoteMissing:
            pass  # a foreign shard, or an address signed for the tar alone
    return [(remote, cache.record_of(remote))]


def _folder(folder: Remote, cache: ShardCache) -> list[tuple[Remote, ShardRecord]]:
    path = folder.inside(INDEX_NAME)
    try:
        content = _json(cache.read(path), path)
    except RemoteMissing as error:
        raise UserError(
            f"{error}; the address of a folder of shards needs {INDEX_NAME} there (python launch/prepare.py index makes"
            " it, before shards are copied there); name single shards by a pattern whose path ends in .tar"
        ) from None
    values = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(values, list):
        raise UserError(f"{path}: holds no list 'shards'; index the shards again")
    records = [_record(value, path) for value in values]
    return [(folder.inside(record.shard), record) for record in records]


def _record(value: Any, path: Remote) -> ShardRecord:
    return ShardRecord.from_json(value, cast(Any, path))  # it takes the path for its messages alone


def _json(data: bytes, remote: Remote) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{remote}: not valid JSON ({error}); check the address or index the shards again") from None
