"""The diffusers folder of a pretrained Wan: its configuration and weight files, or what is wrong with it."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import WanTransformer3DModel

from sgmd_dist.errors import UserError

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_SUPPORTED = "supported are Wan2.1 T2V and Wan2.2 TI2V-5B"


@dataclass(frozen=True)
class WanFolder:
    """A transformer's folder, its constructor's arguments and its weights.

    `expand_timesteps`: what the pipeline that the folder lies in says; False without one.
    """

    path: Path
    config: dict[str, Any]
    weight_files: list[Path]
    expand_timesteps: bool


def read_folder(pretrained: Path, key: str) -> WanFolder:
    """Read everything about a pipeline's or a transformer's folder but the weights themselves.

    Args:
        key: the recipe key that gave `pretrained`, for messages.

    Raises:
        UserError: something is missing or broken, or it is another kind of model.
    """
    if not pretrained.is_dir():
        raise UserError(
            f"{key} = '{pretrained}': no such folder (working directory {Path.cwd()}); download the model's diffusers"
            f" folder there, or set {key}=PATH"
        )
    folder = pretrained / "transformer" if (pretrained / "transformer").is_dir() else pretrained
    where = f"{key} = '{pretrained}'"
    return WanFolder(folder, _config(folder, where), _weight_files(folder, where), _expand_timesteps(folder, where))


def _config(folder: Path, where: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{where}: no {path}; expected a diffusers pipeline or transformer")
    config = _read_object(path, where)
    name = config.get("_class_name")
    if name != WanTransformer3DModel.__name__:
        raise UserError(f"{where}: {path} describes {name}, expected {WanTransformer3DModel.__name__}")
    parameters = inspect.signature(WanTransformer3DModel.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}  # older files lack newer keys
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if not k.startswith("_")}
    merged = {**defaults, **given}
    _refuse_image_to_video(merged, path, where)
    return merged


def _refuse_image_to_video(config: dict[str, Any], path: Path, where: str) -> None:
    found = [f"{name} = {config[name]}" for name in ("image_dim", "added_kv_proj_dim") if config[name] is not None]
    if config["in_channels"] != config["out_channels"]:
        found.append(f"in_channels = {config['in_channels']} and out_channels = {config['out_channels']}")
    if found:
        raise UserError(f"{where}: {path} has {', '.join(found)}: an image-to-video model; {_SUPPORTED}")


def _expand_timesteps(folder: Path, where: str) -> bool:
    path = folder.parent / "model_index.json"
    if not path.exists():
        return False
    index = _read_object(path, where)
    second = index.get("transformer_2")
    if second not in (None, [None, None]) or index.get("boundary_ratio") is not None:
        raise UserError(
            f"{where}: {path} has transformer_2 = {json.dumps(second)} and boundary_ratio ="
            f" {json.dumps(index.get('boundary_ratio'))}: a model of two transformers, as Wan2.2-A14B; {_SUPPORTED}"
        )
    expand = index.get("expand_timesteps")
    if not isinstance(expand, bool | None):
        raise UserError(f"{where}: {path} has expand_timesteps = {json.dumps(expand)}, expected true or false")
    return bool(expand)


def _weight_files(folder: Path, where: str) -> list[Path]:
    if (folder / _INDEX).exists():
        return _indexed_files(folder / _INDEX, where)
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise UserError(f"{where}: {folder} holds no *.safetensors weights; download them too")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"{where}: {folder} holds {names}, and neither {_WEIGHTS} nor {_INDEX}; add the one that is meant"
        )
    return found


def _indexed_files(index: Path, where: str) -> list[Path]:
    weight_map = _read_object(index, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{where}: {index} has no weight_map from tensors to files; download it again")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{where}: {index} names files that are not there: {', '.join(missing)}; download them too")
    return files


def _read_object(path: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: {path} holds {json.dumps(content)[:80]}, expected a JSON object")
    return content
