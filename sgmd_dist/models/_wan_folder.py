"""The diffusers folder of a pretrained Wan: its configuration and weight files, or what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import WanTransformer3DModel

from sgmd_dist.errors import UserError
from sgmd_dist.models._folder import read_config, read_object, transformer_folder, weight_files
from sgmd_dist.models._wan_experts import FOLDERS, INDEX
from sgmd_dist.models._wan_image import wrong_channels

_SUPPORTED = "supported are Wan2.1 T2V and I2V, Wan2.2 TI2V-5B and Wan2.2 T2V-A14B and I2V-A14B"


@dataclass(frozen=True)
class WanFolder:
    """A transformer's folder, its constructor's arguments and its weights.

    `expand_timesteps`: what the pipeline that the folder lies in says; False without one.
    `boundary_ratio`: the noise level from which this transformer serves, where the pipeline has a second one for those
    below, whose weights are `low_noise_files`; None with one transformer.
    """

    path: Path
    config: dict[str, Any]
    weight_files: list[Path]
    expand_timesteps: bool
    boundary_ratio: float | None = None
    low_noise_files: list[Path] = field(default_factory=list)


def read_folder(pretrained: Path, key: str, boundary_ratio: float | None = None) -> WanFolder:
    """Read everything about a pipeline's or a transformer's folder but the weights themselves.

    The folder of a pipeline's transformer, either of two, stands for the pipeline.

    Args:
        key: the recipe key that gave `pretrained`, for messages.
        boundary_ratio: takes the place of the pipeline's own.

    Raises:
        UserError: something is missing or broken, or it is another kind of model.
    """
    folder = transformer_folder(pretrained, key)
    where = f"{key} = '{pretrained}'"
    index = _pipeline_index(folder, where)
    boundary = _boundary(index, boundary_ratio, folder.parent / INDEX, where)
    if boundary is None:
        return WanFolder(folder, _config(folder, where), weight_files(folder, where), _expands(index, folder, where))
    high, low = (folder.parent / name for name in (FOLDERS["high"], FOLDERS["low"]))
    for part in (high, low):
        if not part.is_dir():
            mend = "download the missing one" if boundary_ratio is None else "set model.boundary_ratio=null"
            raise UserError(
                f"{where}: no {part}: with boundary_ratio = {boundary:g} a pipeline has two transformers,"
                f" {high.name} and {low.name}; {mend}"
            )
    config = _config(high, where)
    _refuse_different(config, _config(low, where), where)
    files = weight_files(high, where), weight_files(low, where)
    return WanFolder(high, config, files[0], _expands(index, high, where), boundary, files[1])


def _boundary(index: dict[str, Any], chosen: float | None, path: Path, where: str) -> float | None:
    """The boundary ratio between two transformers; None for a pipeline of one."""
    found = index.get("boundary_ratio")
    if chosen is not None:
        return chosen
    if found is None:
        if index.get(FOLDERS["low"]) not in (None, [None, None]):
            raise UserError(
                f"{where}: {path} names {FOLDERS['low']} and no boundary_ratio; set model.boundary_ratio to the noise"
                " level at which the two take turns, 0.875 for Wan2.2-T2V-A14B"
            )
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < 1:
        raise UserError(f"{where}: {path} has boundary_ratio = {json.dumps(found)}, expected a number between 0 and 1")
    return float(found)


def _refuse_different(high: dict[str, Any], low: dict[str, Any], where: str) -> None:
    differences = [f"{name} = {high[name]} and {low.get(name)}" for name in high if high[name] != low.get(name)]
    if differences:
        raise UserError(
            f"{where}: {FOLDERS['high']} and {FOLDERS['low']} have {', '.join(differences)}: expected two networks of"
            " one architecture"
        )


def _config(folder: Path, where: str) -> dict[str, Any]:
    config = read_config(folder, WanTransformer3DModel, where)
    _refuse_other_inputs(config, folder / "config.json", where)
    return config


def _refuse_other_inputs(config: dict[str, Any], path: Path, where: str) -> None:
    """Refuse models that see other things than a text, or a text and a first frame."""
    found = wrong_channels(config)
    if config["pos_embed_seq_len"] is not None:
        found = f"pos_embed_seq_len = {config['pos_embed_seq_len']}: a model of first and last frames"
    if found:
        raise UserError(f"{where}: {path} has {found}; {_SUPPORTED}")


def _pipeline_index(folder: Path, where: str) -> dict[str, Any]:
    """What the pipeline of a transformer's folder says of itself; nothing without one."""
    path = folder.parent / INDEX
    return read_object(path, where) if path.exists() else {}


def _expands(index: dict[str, Any], folder: Path, where: str) -> bool:
    expand = index.get("expand_timesteps")
    if not isinstance(expand, bool | None):
        path = folder.parent / INDEX
        raise UserError(f"{where}: {path} has expand_timesteps = {json.dumps(expand)}, expected true or false")
    return bool(expand)
