"""Writes trained weights as a diffusers folder, or an adapter as a LoRA, and proves that the folder holds them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sgmd_dist.adapters import Lora
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import VideoModel


def export_diffusers(weights: dict[str, Tensor], model: VideoModel, folder: Path) -> int:
    """Write `weights` as the model's diffusers folder and verify it by reloading; returns the tensor count.

    The folder appears whole: it is written aside and renamed.

    Raises:
        UserError: `folder` exists already or cannot be written, a weight is not finite, or the reloaded tensors
            differ.
    """
    return write_verified(weights, folder, partial(model.export, weights), model.read_export)


def export_adapter(weights: dict[str, Tensor], lora: Lora, model: VideoModel, folder: Path) -> int:
    """Write an adapter as the LoRA that the family's diffusers pipeline loads; returns the tensor count.

    B is stored times the adapter's scale, and alpha as the rank: programs that read no alpha are right too.

    Raises:
        UserError: see `export_diffusers`.
    """
    scaled = {name: weight * lora.scale if ".lora_B." in name else weight for name, weight in weights.items()}
    facts = {"r": lora.rank, "lora_alpha": lora.rank, "target_modules": [*lora.targets]}
    return write_verified(scaled, folder, partial(model.export_adapter, scaled, facts), model.read_adapter)


def write_verified(
    weights: dict[str, Tensor],
    folder: Path,
    write: Callable[[Path], None],
    read: Callable[[Path], dict[str, Tensor]],
) -> int:
    """Let `write` fill a folder aside, compare what `read` finds there with `weights`, and give it its name.

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
    write(aside)
    reloaded = read(aside)
    different = [name for name in weights if not torch.equal(weights[name], reloaded.get(name, torch.empty(0)))]
    if different or len(reloaded) != len(weights):
        raise UserError(f"{aside}: reloading gives other tensors than were written: {', '.join(different[:5])}")
    aside.rename(folder)
    return len(weights)
