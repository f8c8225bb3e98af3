"""Files that are visible whole or not at all, also after a crash of the machine, and locks on them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sgmd_dist.errors import UserError


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk: a rename is durable after it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(file: IO[bytes], temporary: Path, final: Path) -> None:
    """Flush `file` to the disk, close it and give it its name."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(temporary, final)
    sync_folder(final.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file aside, bring it to the disk and give it its name."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        publish(file, temporary, path)


def append_line(path: Path, line: str) -> None:
    """Append a line of text, whole or not at all: what a full disk took of it is cut off again.

    Raises:
        OSError: it cannot be written.
    """
    rest = memoryview(f"{line}\n".encode())
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


def check_writable(folder: Path, said: str) -> None:
    """Refuse a folder that nothing can be written into, before hours go into what it is to hold; makes nothing.

    Args:
        said: how the user named it, as "--out FOLDER".

    Raises:
        UserError: it, or what it would be made in, is no folder or does not let this user write.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))
    if not os.path.isdir(there):
        raise UserError(f"{said}: {there} is no folder; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{said}: {there} may not be written into; choose another folder")


def check_writable_file(path: Path, said: str) -> None:
    """`check_writable` for one file.

    Raises:
        UserError: it cannot be made, or is a folder.
    """
    if path.is_dir():
        raise UserError(f"{said}: is a folder; name a file")
    check_writable(path.parent, said)


@contextmanager
def lock(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock file `path` for the length of the context; the system frees it when the process dies.

    Raises:
        UserError: another process holds it; the message says `refusal`.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path.parent}: {refusal}; wait for it, or choose another folder") from None
        yield
