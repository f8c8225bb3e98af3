"""A pretrained transformer's diffusers folder: its configuration and weight files, or what is wrong with it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from sgmd_dist.errors import UserError
from sgmd_dist.section import Section

TRANSFORMER = "transformer"  # its folder in a pipeline's

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_WEIGHTS_INDEX = f"{_WEIGHTS}.index.json"

Config = TypeVar("Config", bound=Section)


def transformer_folder(pretrained: Path, key: str) -> Path:
    """The folder of the transformer that `pretrained` names: a pipeline's, or its own.

    Args:
        key: the recipe key that gave `pretrained`, for messages.

    Raises:
        UserError: there is no such folder.
    """
    if not pretrained.is_dir():
        raise UserError(
            f"{key} = '{pretrained}': no such folder (working directory {Path.cwd()}); download the model's diffusers"
            f" folder there, or set {key}=PATH"
        )
    return pretrained / TRANSFORMER if (pretrained / TRANSFORMER).is_dir() else pretrained


def read_config(folder: Path, network: type, where: str) -> dict[str, Any]:
    """The constructor's arguments of the `network` that `folder` holds, with its defaults for what a file lacks.

    Raises:
        UserError: there is no config.json, or it is another network's; the message begins with `where`.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{where}: no {path}; expected a diffusers pipeline or transformer")
    config = read_object(path, where)
    name = config.get("_class_name")
    if name != network.__name__:
        raise UserError(f"{where}: {path} describes {name}, expected {network.__name__}")
    parameters = inspect.signature(network.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}  # older files lack newer keys
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if not k.startswith("_")}
    return {**defaults, **given}


def checked(config: dict[str, Any], kind: type[Config], where: str) -> dict[str, Any]:
    """The values that `kind` names, in their types.

    Raises:
        UserError: a value is none that the network takes.
    """
    try:
        return kind(**{name: config[name] for name in kind.model_fields}).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "values"
        raise UserError(f"{where}: {name} = {first['input']!r}: {first['msg']}; download the file again") from None


def refuse_other(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    """Refuse a folder whose network is not the one that the recipe describes."""
    for name, value in expected.items():
        if found[name] != value:
            raise UserError(
                f"{where} has {name} = {json.dumps(found[name])}, expected model.config.{name} = {json.dumps(value)};"
                " name the folder that is meant, or set model.config=null to take what it holds"
            )


def weight_files(folder: Path, where: str) -> list[Path]:
    """The safetensors files of a transformer's folder: those of its index, or the only one.

    Raises:
        UserError: there are none, some are missing, or it is not clear which are meant.
    """
    if (folder / _WEIGHTS_INDEX).exists():
        return _indexed_files(folder / _WEIGHTS_INDEX, where)
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise UserError(f"{where}: {folder} holds no *.safetensors weights; download them too")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"{where}: {folder} holds {names}, and neither {_WEIGHTS} nor {_WEIGHTS_INDEX}; add the one that is meant"
        )
    return found


def _indexed_files(index: Path, where: str) -> list[Path]:
    weight_map = read_object(index, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{where}: {index} has no weight_map from tensors to files; download it again")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{where}: {index} names files that are not there: {', '.join(missing)}; download them too")
    return files


def read_object(path: Path, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the file holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: {path} holds {json.dumps(content)[:80]}, expected a JSON object")
    return content
