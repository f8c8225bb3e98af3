"""The members of a shard's tar, by key, and everything that is wrong with the tar itself.

tarfile takes a damaged header or a cut at a member's boundary for the end of the archive, so the end is checked, and
what lies behind a damaged header is looked for.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from sgmd_dist.data.foreign import FOREIGN_LAYOUTS, OWN_LAYOUT, TENSOR_SUFFIXES
from sgmd_dist.data.format import TENSORS_SUFFIX, check_key
from sgmd_dist.errors import UserError

Members = dict[str, tarfile.TarInfo]  # by what follows the key and a dot in their names

_BLOCK_BYTES = 512
_CHUNK_BYTES = 1 << 20
_RESTORE = "restore the shard or write it again"


@dataclass(frozen=True)
class Mistake:
    """Something wrong in a shard: where, as far as it is known, and what, with its mend."""

    shard: Path
    what: str
    key: str | None = None
    offset: int | None = None  # in the tar, in bytes

    def __str__(self) -> str:
        sample = "" if self.key is None else f" sample '{self.key}'"
        offset = "" if self.offset is None else f" at offset {self.offset}"
        return f"{self.shard}:{sample}{offset}{':' if sample or offset else ''} {self.what}"


@dataclass
class TarScan:
    """What a tar holds: {key: {"json": member, "sample.safetensors": member, ...}} in tar order, and its mistakes."""

    samples: dict[str, Members] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)

    @property
    def layout(self) -> str:
        """OWN_LAYOUT, or the foreign layout whose members the samples have."""
        found = {extension for members in self.samples.values() for extension in members}
        if TENSORS_SUFFIX in found:
            return OWN_LAYOUT
        return next((name for name, own in FOREIGN_LAYOUTS.items() if found & set(vars(own).values())), OWN_LAYOUT)


def scan_tar(path: Path, file: IO[bytes]) -> TarScan:
    """All members of a tar, also those behind a damaged header; nothing of their content is read."""
    total_bytes = os.fstat(file.fileno()).st_size
    members, error = _list(file, ignore_zeros=False)
    scan = TarScan()
    if error or not _is_end(file, _end(members)):
        members, error = _list(file, ignore_zeros=True)
        scan.mistakes += _gaps(path, members, total_bytes)
        if not scan.mistakes or error:
            last = _split(members[-1].name)[0] if members else "none"
            why = error or f"no end of archive at byte {_end(members)}"
            scan.mistakes.append(Mistake(path, f"truncated or damaged after key '{last}' ({why}); {_RESTORE}"))
    for member in members:
        # As webdataset does. The part of a member that a truncated tar still has is reported above.
        if member.isreg() and not member.name.startswith("__") and _end([member]) <= total_bytes:
            _add(path, scan, member)
    layout = scan.layout
    for key, members_of in scan.samples.items():
        first = next(iter(members_of.values()))
        if layout == OWN_LAYOUT:
            try:
                check_key(key, path)
            except UserError as error:
                scan.mistakes.append(Mistake(path, str(error).removeprefix(f"{path}: "), None, first.offset))
        elif not key or not key.isprintable():
            what = f"key {key!r} must be printable and not empty; rename {first.name!r}"
            scan.mistakes.append(Mistake(path, what, None, first.offset))
    return scan


def tar_members(path: Path, file: IO[bytes]) -> dict[str, Members]:
    """The samples of a whole, well-formed tar of our own layout or a foreign one, in tar order.

    Raises:
        UserError: the first mistake of `scan_tar`.
    """
    return whole_scan(path, file).samples


def whole_scan(path: Path, file: IO[bytes]) -> TarScan:
    """`scan_tar` of a tar without mistakes; the first one is a `UserError`."""
    scan = scan_tar(path, file)
    if scan.mistakes:
        raise UserError(str(scan.mistakes[0]))
    return scan


def _list(file: IO[bytes], *, ignore_zeros: bool) -> tuple[list[tarfile.TarInfo], str]:
    """The members up to the first damage, or with `ignore_zeros` all, and what tarfile said in the end."""
    file.seek(0)
    members: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=ignore_zeros) as tar:
            members += tar
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, MemoryError) as error:
        return members, str(error) or type(error).__name__
    return members, ""


def _add(path: Path, scan: TarScan, member: tarfile.TarInfo) -> None:
    key, extension = _split(member.name)
    if dotted := next((name for name in TENSOR_SUFFIXES if extension.endswith(f".{name}")), None):
        whole = member.name.removesuffix(f".{dotted}")
        what = (
            f"key {whole!r} has a dot, where webdataset splits names; rename it, for example "
            f"{whole.replace('.', '_')!r}"
        )
        scan.mistakes.append(Mistake(path, what, None, member.offset))
    if member.issparse():  # its bytes in the tar are not its content
        what = f"{member.name} is a sparse member; write the tar again without --sparse"
        scan.mistakes.append(Mistake(path, what, key, member.offset))
        return
    known = scan.samples.setdefault(key, {})
    if extension in known:
        what = f"has two members {member.name}; give samples keys of their own"
        scan.mistakes.append(Mistake(path, what, key, member.offset))
    else:
        known[extension] = member


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member's name, as webdataset splits it: at the first dot of the last part of the path."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def _end(members: list[tarfile.TarInfo]) -> int:
    """Where the next member's header belongs."""
    if not members:
        return 0
    return members[-1].offset_data + -(-members[-1].size // _BLOCK_BYTES) * _BLOCK_BYTES


def _is_end(file: IO[bytes], position: int) -> bool:
    """Whether a file holds only zeros from `position` on, and as many as end an archive."""
    file.seek(position)
    num_bytes = 0
    while chunk := file.read(_CHUNK_BYTES):
        num_bytes += len(chunk)
        if any(chunk):
            return False
    return num_bytes >= 2 * _BLOCK_BYTES


def _gaps(path: Path, members: list[tarfile.TarInfo], total_bytes: int) -> list[Mistake]:
    """Where bytes of the tar belong to no member, and a last member that the tar does not hold whole."""
    mistakes, end, key = [], 0, "none"
    for member in members:
        if member.offset > end:
            what = f"truncated or damaged after key '{key}': bytes {end} to {member.offset} hold no member; {_RESTORE}"
            mistakes.append(Mistake(path, what, None, end))
        end, key = _end([member]), _split(member.name)[0]
        if end > total_bytes:
            what = f"{member.name} of {member.size} bytes is cut: truncated or damaged after key '{key}'; {_RESTORE}"
            mistakes.append(Mistake(path, what, key, member.offset_data))
    return mistakes
