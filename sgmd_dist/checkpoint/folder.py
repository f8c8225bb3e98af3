"""A checkpoint's folder: its name, its description, and how it is committed, found, set aside and pruned."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from sgmd_dist import __version__
from sgmd_dist.durable import sync_folder, write_durably
from sgmd_dist.errors import UserError

FOLDER = "checkpoints"
RECIPE_FILE = "recipe.yaml"
ROLLBACKS_FILE = "rollbacks.json"  # of a run folder
METADATA_FILE = ".metadata"  # DCP's
_META_FILE = "meta.json"
_META_DIGEST = "sha256"
_NAME = re.compile(r"step-(\d{8})")
_LEFTOVER = re.compile(r"step-\d{8}\.(tmp|replaced)")


class DamagedCheckpoint(UserError):
    """A checkpoint's files are not what was saved: another checkpoint may do."""


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself.

    checksums: per tree, the sum of its tensors' bits, modulo 2^64.
    digests: SHA-256 of its other files by name.
    saved_at: UTC, ISO 8601. layout: mesh axes and number of ranks that saved it. Both inform and decide nothing.
    """

    step: int
    stream: dict[str, Any]
    num_tensors: dict[str, int]
    checksums: dict[str, int]
    versions: dict[str, str] = field(default_factory=lambda: {"sgmd_dist": __version__, "torch": torch.__version__})
    digests: dict[str, str] = field(default_factory=dict)
    saved_at: str = ""
    layout: dict[str, int] = field(default_factory=dict)


def path_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is or will be."""
    return run_dir / FOLDER / f"step-{step:08d}"


def present(run_dir: Path) -> list[Path]:
    """The folders with a checkpoint's name in a run folder, oldest first. One that lost its description counts."""
    folder = run_dir / FOLDER
    found = folder.iterdir() if folder.is_dir() else []
    return sorted(path for path in found if has_name(path))


def committed(run_dir: Path) -> list[Path]:
    """The committed checkpoints of a run folder, oldest first."""
    return [path for path in present(run_dir) if (path / _META_FILE).exists()]


def is_checkpoint(path: Path) -> bool:
    """True where `path` is a checkpoint's folder, and not a run's."""
    return (path / _META_FILE).exists()


def has_name(path: Path) -> bool:
    """True where `path` is a folder that a commit named, whatever is left in it."""
    return path.is_dir() and _NAME.fullmatch(path.name) is not None


def find(where: str | Path) -> Path:
    """The checkpoint that `where` names: itself, or the newest committed one of a run folder.

    Raises:
        UserError: there is none.
    """
    path = Path(where)
    if is_checkpoint(path):
        return path
    found = committed(path)
    if not found:
        raise UserError(f"{path}: expected a checkpoint or a run folder with a committed one in {path / FOLDER}")
    return found[-1]


def read_meta(checkpoint: Path) -> Meta:
    """The checkpoint's own description.

    Raises:
        DamagedCheckpoint: meta.json is missing or damaged.
    """
    path = checkpoint / _META_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop(_META_DIGEST, None)
        if digest is not None and digest != _digest_of(content):
            raise ValueError("its content is not what was saved")
        meta = Meta(**content)
        parts = (meta.stream, meta.num_tensors, meta.checksums, meta.versions, meta.digests, meta.layout)
        if not isinstance(meta.step, int) or not all(isinstance(part, dict) for part in parts):
            raise ValueError("its fields are of other types")
        if set(meta.num_tensors) != set(meta.checksums):
            raise ValueError("its fields do not fit each other")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{path}: is not a checkpoint's description ({error}); use another checkpoint"
        ) from None
    return meta


def write_meta(folder: Path, meta: Meta) -> None:
    """Write the description durably, with its own digest."""
    content = json.loads(json.dumps(asdict(meta)))
    content[_META_DIGEST] = _digest_of(content)
    write_durably(folder / _META_FILE, json.dumps(content, indent=1).encode())


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(checkpoint: Path, meta: Meta, name: str) -> None:
    """Compare a file with the digest that the description has of it.

    Raises:
        DamagedCheckpoint: it is missing or differs.
    """
    if name not in meta.digests:
        return
    try:
        found = digest(checkpoint / name)
    except OSError as error:
        raise damaged(checkpoint, f"{name} cannot be read ({error.strerror})") from None
    if found != meta.digests[name]:
        raise damaged(checkpoint, f"{name} is not what was saved")


def unfit(checkpoint: Path, why: str) -> UserError:
    """The error for a checkpoint of something else."""
    return UserError(f"{checkpoint}: is of another network: {why}; use the model that {checkpoint / RECIPE_FILE} names")


def damaged(checkpoint: Path, why: str) -> DamagedCheckpoint:
    """The error for a checkpoint whose files changed."""
    return DamagedCheckpoint(f"{checkpoint}: is damaged: {why}; use another checkpoint")


def commit(aside: Path, final: Path) -> None:
    """Give a checkpoint that is complete its name. The rename is what makes it one."""
    sync_folder(aside)
    if final.exists():  # a run resumed from before this step; the old one stays until the new one is complete
        _set_aside(final)
    aside.rename(final)
    sync_folder(final.parent)


def _set_aside(checkpoint: Path) -> None:
    """Take back a commit: `prune` removes what this leaves, also after a kill in between."""
    replaced = checkpoint.with_suffix(".replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    checkpoint.rename(replaced)


def set_damaged_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that its step can be saved again; nothing removes it but a person."""
    target, number = checkpoint.with_suffix(".damaged"), 1
    while target.exists():
        number += 1
        target = checkpoint.with_suffix(f".damaged-{number}")
    checkpoint.rename(target)
    sync_folder(checkpoint.parent)
    return target


def prune(run_dir: Path, newest: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints up to `newest`, and the leftovers of killed saves."""
    try:
        for old in [path for path in committed(run_dir) if path.name <= newest.name][:-keep]:
            _set_aside(old)
        for leftover in (run_dir / FOLDER).iterdir():
            if _LEFTOVER.fullmatch(leftover.name):
                shutil.rmtree(leftover)
    except OSError as error:  # the checkpoint is committed: too many are better than none
        logger.warning("{}: older checkpoints cannot be removed ({})", run_dir / FOLDER, error)
