"""Writes trained weights as a diffusers folder and proves that the folder holds them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from sgmd_dist.errors import UserError
from sgmd_dist.models.base import VideoModel


def export_diffusers(weights: dict[str, Tensor], model: VideoModel, folder: Path) -> int:
    """Write `weights` as the model's diffusers folder and verify it by reloading; returns the tensor count.

    The folder appears whole: it is written aside and renamed.

    Raises:
        UserError: `folder` exists already or cannot be written, a weight is not finite, or the reloaded tensors
            differ.
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
    model.export(weights, aside)
    reloaded = model.read_export(aside)
    different = [name for name in weights if not torch.equal(weights[name], reloaded.get(name, torch.empty(0)))]
    if different or len(reloaded) != len(weights):
        raise UserError(f"{aside}: reloading gives other tensors than were written: {', '.join(different[:5])}")
    aside.rename(folder)
    return len(weights)
