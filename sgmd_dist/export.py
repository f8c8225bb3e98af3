"""Writes trained weights as a diffusers folder and proves that the folder holds them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from sgmd_dist.errors import UserError
from sgmd_dist.models.base import VideoModel


def export_diffusers(weights: dict[str, Tensor], model: VideoModel, folder: Path) -> int:
    """Write `weights` as a diffusers transformer folder and verify it by reloading; returns the tensor count.

    The folder appears whole: it is written aside and renamed.

    Raises:
        UserError: `folder` exists already, or the reloaded tensors differ.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another folder or remove it")
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.export(weights, aside)
    reloaded = model.read_export(aside)
    different = [name for name in weights if not torch.equal(weights[name], reloaded.get(name, torch.empty(0)))]
    if different or len(reloaded) != len(weights):
        raise UserError(f"{aside}: reloading gives other tensors than were written: {', '.join(different[:5])}")
    aside.rename(folder)
    return len(weights)
