"""The byte budget of a folder of shards that many processes fill, and the locks by which they agree."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_PAUSE_S = 0.05
_LOCK = ".room.lock"


class Room:
    """Keeps the `.tar` and `.part` files of `folder` within `max_bytes`.

    A shard's lock (`lock_path`) is held by who brings it; whoever has a shard open holds a shared lock on the shard
    itself. Neither is ever waited for while the room's own lock is held.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    def take(self, num_bytes: int, name: str) -> IO[bytes]:
        """A new file `<name>.*.part` that counts `num_bytes`, for the shard `name`, whose lock the caller holds.

        Other shards go for it. Where the parts of others fill the budget it waits until they have become shards.
        """
        while True:
            with flock(self._folder / _LOCK):
                if self._evict(self._max_bytes - num_bytes):
                    return self._new_part(num_bytes, name)
            time.sleep(_PAUSE_S)

    def keep_budget(self) -> None:
        """Give up shards beyond the budget, after one has come whose size was not known before."""
        with flock(self._folder / _LOCK):
            self._evict(self._max_bytes)

    def _new_part(self, num_bytes: int, name: str) -> IO[bytes]:
        file: Any = tempfile.NamedTemporaryFile(  # noqa: SIM115 - the caller closes it
            dir=self._folder, prefix=f"{name}.", suffix=".part", delete=False
        )
        file.truncate(num_bytes)  # without blocks on the disk yet: it is how others see what is taken
        return file

    def _evict(self, allowed_bytes: int) -> bool:
        """Give up leftovers, then the least recently used shards, until the rest takes at most `allowed_bytes`."""
        found = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                if path.suffix in (".tar", ".part"):
                    status = path.stat()
                    found.append((path.suffix == ".tar", status.st_mtime_ns, status.st_size, path))
        found.sort()
        total = sum(size for _, _, size, _ in found)
        for also_open in (False, True):
            for entry in list(found):
                if total <= allowed_bytes:
                    return True
                if self._give_up(entry[-1], also_open):
                    total -= entry[2]
                    found.remove(entry)
        return total <= allowed_bytes

    def _give_up(self, path: Path, also_open: bool) -> bool:
        """Remove a shard or leftover, unless somebody brings it now, or has it open and it is to be spared."""
        with flock(lock_path(self._folder, path.name.partition(".")[0]), wait=False) as lock:
            if lock is None:
                return False
            try:
                with open(path, "rb") as file:
                    if not also_open:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            except BlockingIOError:
                return False
            except FileNotFoundError:
                pass  # gone already: its bytes are free all the same
            lock.unlink()
            return True


def lock_path(folder: Path, name: str) -> Path:
    """The lock file of the shard `name`."""
    return folder / f"{name}.lock"


@contextmanager
def flock(path: Path, wait: bool = True) -> Iterator[Path | None]:
    """Hold the lock file `path`, which is made; yields None where it is taken and `wait` is False.

    Each call opens the file itself, so that threads of one process exclude each other too. The holder may remove it:
    who waited for it then begins anew.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            if _is_file(path, descriptor):
                yield path
                return
        finally:
            os.close(descriptor)


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
