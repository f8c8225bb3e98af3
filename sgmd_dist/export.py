"""Writes trained weights as a diffusers folder or by original names, or an adapter as a LoRA, and proves that the
folder holds them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from sgmd_dist.adapters import Lora
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import MAX_SHARD_SIZE, OriginalNames, VideoModel


@dataclass(frozen=True)
class Form:
    """How an export is written.

    Attributes:
        dtype: of the tensors in the files.
        max_shard_size: of a file of a diffusers folder, as diffusers takes it.
        notes: texts beside the weights, by file name.
    """

    dtype: torch.dtype = torch.float32
    max_shard_size: str = MAX_SHARD_SIZE
    notes: Mapping[str, str] = field(default_factory=dict)


AS_TRAINED = Form()


def export_diffusers(weights: Mapping[str, Tensor], model: VideoModel, folder: Path, form: Form = AS_TRAINED) -> int:
    """Write `weights` as the model's diffusers folder and verify it by reloading; returns the tensor count.

    The folder appears whole: it is written aside and renamed.

    Raises:
        UserError: `folder` exists already or cannot be written, a weight is not finite, or the reloaded tensors
            differ.
    """
    cast = cast_to(weights, form.dtype)
    write = partial(model.export, cast, max_shard_size=form.max_shard_size)
    return write_verified(cast, folder, write, model.read_export, form.notes)


def export_original(weights: Mapping[str, Tensor], model: VideoModel, folder: Path, form: Form = AS_TRAINED) -> int:
    """Write `weights` by the names of the model's first release, one safetensors file for each network.

    Raises:
        UserError: see `export_diffusers`; or the family has no such names.
    """
    cast, named = cast_to(weights, form.dtype), with_original_names(model)
    return write_verified(cast, folder, partial(named.export_original, cast), named.read_original, form.notes)


def export_adapter(
    weights: Mapping[str, Tensor],
    lora: Lora,
    model: VideoModel,
    folder: Path,
    form: Form = AS_TRAINED,
    *,
    original: bool = False,
) -> int:
    """Write an adapter as the LoRA that the family's diffusers pipeline loads; returns the tensor count.

    B is stored times the adapter's scale, and alpha as the rank: programs that read no alpha are right too.

    Args:
        original: by the names of the model's first release.

    Raises:
        UserError: see `export_original`.
    """
    scaled = {name: weight * lora.scale if ".lora_B." in name else weight for name, weight in weights.items()}
    cast = cast_to(scaled, form.dtype)
    if original:
        named = with_original_names(model)
        write, read = partial(named.export_original_adapter, cast), named.read_original_adapter
    else:
        facts = {"r": lora.rank, "lora_alpha": lora.rank, "target_modules": [*lora.targets]}
        write, read = partial(model.export_adapter, cast, facts), model.read_adapter
    return write_verified(cast, folder, write, read, form.notes)


def cast_to(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Without a copy where they have the dtype."""
    return {name: weight.to(dtype) for name, weight in weights.items()}


def with_original_names(model: VideoModel) -> OriginalNames:
    """The model, where its family knows the names of its first release.

    Raises:
        UserError: it does not.
    """
    if not isinstance(model, OriginalNames):
        raise UserError("--keys original: this model family has diffusers' names only; leave out --keys")
    return model


def write_verified(
    weights: Mapping[str, Tensor],
    folder: Path,
    write: Callable[[Path], None],
    read: Callable[[Path], dict[str, Tensor]],
    notes: Mapping[str, str],
) -> int:
    """Let `write` fill a folder aside, compare what `read` finds there with `weights`, and give it its name.

    Whatever goes wrong, neither the folder nor the one aside is left, unless the process is killed.

    Raises:
        UserError: see `export_diffusers`.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another folder or remove it")
    if broken := [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]:
        raise UserError(
            f"{folder}: not written: {len(broken)} tensors hold NaN or infinity ({', '.join(broken[:5])}); the training"
            " diverged, export an earlier checkpoint"
        )
    aside = folder.with_name(f"{folder.name}.tmp")
    try:
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); choose another folder") from None
    try:
        write(aside)
        for name, text in notes.items():
            (aside / name).write_text(text, encoding="utf-8")
        _compare(weights, read(aside), folder)
        _open_to_readers(aside)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error}); make room, or choose another folder") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return len(weights)


def _open_to_readers(folder: Path) -> None:
    """Give the files the folder's permissions: safetensors makes its own for the owner alone."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _compare(weights: Mapping[str, Tensor], reloaded: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse a folder that reads back otherwise. A reader may widen a dtype; values are compared as float32."""
    nothing = torch.empty(0)
    different = [
        name for name, weight in weights.items() if not torch.equal(weight.float(), reloaded.get(name, nothing).float())
    ]
    different += [name for name in reloaded if name not in weights]
    if different:
        names = ", ".join(different[:5])
        raise UserError(
            f"{folder}: not written: reloading gives other tensors than were written: {names}; if the disk is at fault,"
            " choose a folder on another"
        )
