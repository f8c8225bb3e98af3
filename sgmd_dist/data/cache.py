"""The node cache: whole shards from elsewhere on a local disk, shared by all processes of a node.

    <folder>/<content>.tar     a shard, named by the sha256 of its record: another content is another file
             <name>.lock       held by who fetches it, or takes it away
             <name>.*.part     a shard on its way; without a holder of its lock it is a leftover, and removed
             <address>.index   the record of a shard that came without one; <address>.file: an index of others

The tars and parts never take more than `max_bytes`: the least recently used shards go first, those that nobody has open
before those that somebody has. A shard that is open stays readable after it went; a file counts with its whole size
from the beginning of its way. Any number of processes and threads may ask for any shards at any time; each is fetched
once. A killed process harms nothing.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TypeVar

from loguru import logger

from sgmd_dist.data import remote as remote_files
from sgmd_dist.data.examine import build_index
from sgmd_dist.data.format import CorruptSample
from sgmd_dist.data.record import ShardRecord
from sgmd_dist.data.remote import Remote, RemoteFailure, RemoteRefused
from sgmd_dist.data.room import Room, flock, lock_path
from sgmd_dist.durable import publish, write_durably
from sgmd_dist.errors import UserError

DEFAULT_BYTES = 200 * 10**9
_SILENCE_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0

T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """A shard to have: where it lies, its name in the cache, and its bytes."""

    remote: Remote
    name: str
    num_bytes: int

    @classmethod
    def of(cls, remote: Remote, record: ShardRecord) -> Wanted:
        """Shards of one content are one file, whatever their addresses."""
        content = {key: value for key, value in record.to_json().items() if key != "shard"}
        return cls(remote, hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(), record.tar_bytes)


def default_folder() -> Path:
    """Where shards are kept unless `data.cache` says otherwise."""
    return Path(tempfile.gettempdir()) / f"sgmd_dist-shards-{os.geteuid()}"


class ShardCache:
    """Brings shards from elsewhere to this node. Nothing is written before the first is asked for.

    Args:
        folder: on a disk of the node; made if absent. By default `default_folder()`, which must belong to this user.
        max_bytes: budget of the shards.
        silence_s: a server or command that sends nothing for so long has failed.
        retries: of what is needed at opening (`read`, `record_of`). `path` and `open` try once: readers try again.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        max_bytes: int = DEFAULT_BYTES,
        *,
        silence_s: float = _SILENCE_S,
        retries: int = 4,
    ) -> None:
        self.folder = default_folder() if folder is None else Path(folder).expanduser()
        self.max_bytes = int(max_bytes)
        self._room = Room(self.folder, self.max_bytes)
        self._is_default = folder is None
        self._silence_s, self._retries = silence_s, retries
        self._is_ready = False
        # One process asks once, and sees one state of the data set throughout.
        self._files: dict[str, bytes] = {}
        self._records: dict[str, ShardRecord] = {}

    # ------------------------------------------------------------------------------------------ shards

    def path(self, wanted: Wanted) -> Path:
        """The local file of a shard, fetched if need be. It may be given up again at any time: see `open`.

        Raises:
            RemoteFailure: an OSError that may pass: a lost connection, a server's 5xx, a stall, a failing command.
            RemoteRefused: a UserError that will not: no such file, no access, another size than the index says.
        """
        path = self._path(wanted)
        if not self._is_there(path, wanted.num_bytes):
            with self._locked(wanted.name):
                self._fetch_if_absent(wanted)
        return path

    def open(self, wanted: Wanted) -> int:
        """A descriptor of the shard, for reading; while it is open the shard is given up last. Raises as `path`."""
        while True:
            descriptor = self._opened(wanted)
            if descriptor is None:
                with self._locked(wanted.name):  # who holds it is not robbed of the shard
                    self._fetch_if_absent(wanted)
                    descriptor = self._opened(wanted)
            if descriptor is not None:
                return descriptor

    def check_budget(self, what: object, num_bytes: int) -> None:
        """Raise `UserError` unless the cache can hold a shard of `num_bytes`."""
        if num_bytes > self.max_bytes:
            raise RemoteRefused(
                f"data.cache_gb = {self.max_bytes / 1e9:g}: {what} alone has {num_bytes / 1e9:.3g} GB; set it higher"
            )

    def _path(self, wanted: Wanted) -> Path:
        return self.folder / f"{wanted.name}.tar"

    def _is_there(self, path: Path, num_bytes: int) -> bool:
        """Whether the shard is kept whole; it is then the most recently used."""
        try:
            if path.stat().st_size == num_bytes:
                os.utime(path)
                return True
        except FileNotFoundError:
            pass  # never fetched, or given up
        return False

    def _opened(self, wanted: Wanted) -> int | None:
        path = self._path(wanted)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            status = os.fstat(descriptor)
            if status.st_nlink and status.st_size == wanted.num_bytes:
                os.utime(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _fetch_if_absent(self, wanted: Wanted) -> None:
        path = self._path(wanted)
        if self._is_there(path, wanted.num_bytes):
            return
        with self._part(wanted.name, wanted.remote, wanted.num_bytes) as file:
            num_bytes = self._copy(wanted.remote, file, wanted.num_bytes, "its index says")
            if num_bytes != wanted.num_bytes:
                raise self._short(wanted, num_bytes)
            self._publish(file, wanted)

    def _short(self, wanted: Wanted, num_bytes: int) -> RemoteFailure | RemoteRefused:
        said = f"{wanted.remote}: {num_bytes} bytes, the index says {wanted.num_bytes}"
        if remote_files.stat(wanted.remote).num_bytes == num_bytes:
            return RemoteRefused(f"{said}; the shard was replaced or cut: restore it or index it again")
        return RemoteFailure(f"{said}: the transfer was cut")

    # ------------------------------------------------------------------------------------------ at opening

    def read(self, remote: Remote) -> bytes:
        """A small file, an index for instance; kept, and fetched again only where the server has another version.

        Raises:
            RemoteMissing: it is not there.
            UserError: it cannot be had, the last of `retries` attempts included.
        """
        if remote.url not in self._files:
            name = _address_name(remote)
            with self._locked(name):
                self._files[remote.url] = self._patiently(lambda: self._read(remote, self.folder / f"{name}.file"))
        return self._files[remote.url]

    def _read(self, remote: Remote, kept: Path) -> bytes:
        """A kept file is one line of its version and then its bytes."""
        version = remote_files.stat(remote).version
        if version is not None and kept.exists():
            head, _, data = kept.read_bytes().partition(b"\n")
            if head == json.dumps(version).encode():
                return data
        with closing(remote_files.chunks(remote, self._silence_s)) as parts:
            data = b"".join(parts)
        if version is not None:
            with self._disk_errors(remote):
                write_durably(kept, json.dumps(version).encode() + b"\n" + data)
        return data

    def record_of(self, remote: Remote) -> ShardRecord:
        """The record of a shard that has none beside it: it is fetched whole and read, once for each version.

        Of a command's output there are no versions: what it printed first stays.

        Raises:
            UserError: it cannot be had, the last of `retries` attempts included, or is no shard.
        """
        if remote.url not in self._records:
            name = _address_name(remote)
            with self._locked(name):
                self._records[remote.url] = self._patiently(lambda: self._record_of(remote, name))
        return self._records[remote.url]

    def _record_of(self, remote: Remote, name: str) -> ShardRecord:
        kept = self.folder / f"{name}.index"
        seen = asdict(remote_files.stat(remote))
        if kept.exists():
            content = json.loads(kept.read_bytes())
            if all(value is None or value == content["seen"][key] for key, value in seen.items()):
                return ShardRecord.from_json(content["record"], kept)
        logger.info("{}: has no index, it is fetched and read", remote)
        with self._part(name, remote, seen["num_bytes"] or 0) as file:
            num_bytes = self._copy(remote, file, self.max_bytes, "data.cache_gb allows")
            if seen["num_bytes"] not in (None, num_bytes):
                raise RemoteFailure(f"{remote}: {num_bytes} of {seen['num_bytes']} bytes: the transfer was cut")
            file.flush()
            record = replace(_indexed(Path(file.name), remote), shard=remote.name)
            wanted = Wanted.of(remote, record)
            with self._locked(wanted.name):
                self._publish(file, wanted)
        self._room.keep_budget()  # a command does not tell its size before
        with self._disk_errors(remote):
            write_durably(kept, json.dumps({"seen": seen, "record": record.to_json()}).encode())
        return record

    def _patiently(self, fetch: Callable[[], T]) -> T:
        pause_s = _FIRST_PAUSE_S
        for attempt in range(self._retries + 1):
            try:
                return fetch()
            except RemoteFailure as error:
                if attempt == self._retries:
                    raise UserError(f"{error} (attempt {attempt + 1}); try again later or check the address") from None
                logger.warning("{}; again in {:g} s", error, pause_s)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        raise AssertionError("the last attempt returns or raises")

    # ------------------------------------------------------------------------------------------ files

    def _copy(self, remote: Remote, file: IO[bytes], limit: int, who_says: str) -> int:
        """Write what `remote` sends, at most `limit` bytes; returns their number."""
        num_bytes = 0
        with closing(remote_files.chunks(remote, self._silence_s)) as parts:
            for part in parts:
                num_bytes += len(part)
                if num_bytes > limit:
                    raise RemoteRefused(
                        f"{remote}: more bytes than the {limit} that {who_says}; index the shard again or raise"
                        " data.cache_gb"
                    )
                with self._disk_errors(remote):
                    file.write(part)
        return num_bytes

    def _publish(self, file: IO[bytes], wanted: Wanted) -> None:
        with self._disk_errors(wanted.remote):
            publish(file, Path(file.name), self._path(wanted))

    @contextmanager
    def _part(self, name: str, remote: Remote, num_bytes: int) -> Iterator[IO[bytes]]:
        """A file to write a shard of `num_bytes` (0: unknown) into; removed unless it was given its name.

        The lock `name` is held.
        """
        self.check_budget(remote, num_bytes)
        for leftover in self.folder.glob(f"{name}.*.part"):
            leftover.unlink(missing_ok=True)
        with self._disk_errors(remote):
            file = self._room.take(num_bytes, name)
        try:
            with file:
                yield file
        finally:
            Path(file.name).unlink(missing_ok=True)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        self._make_folder()
        with flock(lock_path(self.folder, name)):
            yield

    def _make_folder(self) -> None:
        if self._is_ready:
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.folder.lstat()
        except OSError as error:
            raise UserError(
                f"data.cache: {self.folder}: cannot be made ({error.strerror}); name a folder on this node's disk"
            ) from None
        if self._is_default and (status.st_uid != os.geteuid() or not self.folder.is_dir() or self.folder.is_symlink()):
            raise UserError(f"{self.folder}: does not belong to you; set data.cache to a folder of your own")
        self._is_ready = True

    @contextmanager
    def _disk_errors(self, remote: Remote) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG):
                raise
            raise RemoteRefused(
                f"{self.folder}: cannot keep {remote} ({error.strerror}); free space there, lower data.cache_gb, or set"
                " data.cache to a folder on another disk"
            ) from None


def _address_name(remote: Remote) -> str:
    return hashlib.sha256(b"address\0" + remote.url.encode()).hexdigest()


def _indexed(path: Path, remote: Remote) -> ShardRecord:
    try:
        return build_index(path)
    except CorruptSample as error:
        raise CorruptSample(str(error).replace(str(path), str(remote))) from None
    except UserError as error:
        raise UserError(str(error).replace(str(path), str(remote))) from None
