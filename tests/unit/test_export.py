"""An exported folder is whole, loads in diffusers alone, and holds exactly the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sgmd_dist.assemble import base_weights, build_model
from sgmd_dist.errors import UserError
from sgmd_dist.export import Form, export_diffusers
from sgmd_dist.models.base import VideoModel
from sgmd_dist.recipe import Recipe


@pytest.fixture
def model(tiny_recipe: Callable[..., Recipe]) -> VideoModel:
    return build_model(tiny_recipe(), "generator")


@pytest.fixture
def weights(model: VideoModel) -> dict[str, Tensor]:
    """Random float32 weights of every parameter."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in model.build().named_parameters()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_diffusers_loads_the_folder_with_the_very_weights(
    model: VideoModel, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "transformer"
    assert export_diffusers(weights, model, folder) == len(weights)
    loaded = WanTransformer3DModel.from_pretrained(folder, local_files_only=True).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    assert [path.name for path in folder.parent.iterdir()] == ["transformer"]


def test_what_exists_is_never_overwritten(model: VideoModel, weights: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "file"):
        with pytest.raises(UserError, match=rf"{name}: exists already; choose another folder or remove it"):
            export_diffusers(weights, model, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_leftover_of_a_killed_export_does_not_get_into_the_next(
    model: VideoModel, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "diffusion_pytorch_model-00009-of-00009.safetensors").write_bytes(b"half")
    export_diffusers(weights, model, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert not (tmp_path / "out.tmp").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_network_is_named_and_not_written(
    model: VideoModel, weights: dict[str, Tensor], tmp_path: Path, value: float
) -> None:
    weights["proj_out.bias"][0] = value
    with pytest.raises(UserError, match=r"not written: 1 tensors hold NaN or infinity \(proj_out\.bias\); .* earlier"):
        export_diffusers(weights, model, tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []


def test_a_large_network_is_split_into_files_with_an_index(
    model: VideoModel, weights: dict[str, Tensor], tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    export_diffusers(weights, model, folder, Form(max_shard_size="20KB"))
    files = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(files) > 2 and {path.name for path in files} == set(index["weight_map"].values())
    assert all(sum(tensor.nbytes for tensor in load_file(path).values()) <= 20_000 for path in files)
    loaded = WanTransformer3DModel.from_pretrained(folder, local_files_only=True).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    again = build_model(tiny_recipe(f"model.pretrained={folder}", "model.config=null"), "generator")
    assert all(torch.equal(weight, weights[name]) for name, weight in base_weights(again, 0).items())


def test_the_files_hold_the_chosen_dtype(model: VideoModel, weights: dict[str, Tensor], tmp_path: Path) -> None:
    export_diffusers(weights, model, tmp_path / "out", Form(torch.bfloat16))
    found = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in weights.items())


def test_others_may_read_the_files_as_they_may_the_folder(
    model: VideoModel, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    export_diffusers(weights, model, tmp_path / "out")
    mode = (tmp_path / "out").stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {mode}


def test_notes_lie_beside_the_weights(model: VideoModel, weights: dict[str, Tensor], tmp_path: Path) -> None:
    export_diffusers(weights, model, tmp_path / "out", Form(notes={"README.md": "# Mine ☃\n"}))
    assert (tmp_path / "out/README.md").read_text(encoding="utf-8") == "# Mine ☃\n"


@pytest.mark.parametrize("name", ["file/out", "busy"])
def test_a_place_that_cannot_be_written_is_named(
    model: VideoModel, weights: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    for file in ("file", "busy.tmp"):
        (tmp_path / file).write_text("mine")
    with pytest.raises(UserError, match=rf"{name}: cannot be written .*; choose another folder"):
        export_diffusers(weights, model, tmp_path / name)
    assert (tmp_path / "busy.tmp").read_text() == "mine"


# What goes wrong midway leaves nothing behind


def test_damage_on_the_way_to_the_disk_is_seen(
    model: VideoModel, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of the last tensor."""
    export = model.export

    def damaging(state_dict: dict[str, Tensor], folder: Path, max_shard_size: str) -> None:
        export(state_dict, folder, max_shard_size)
        file = folder / "diffusion_pytorch_model.safetensors"
        data = bytearray(file.read_bytes())
        data[-2] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(model, "export", damaging)
    with pytest.raises(UserError, match=r"out: not written: reloading gives other tensors than were written: \w"):
        export_diffusers(weights, model, tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
def test_a_full_disk_is_named(
    model: VideoModel, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(state_dict: dict[str, Tensor], folder: Path, max_shard_size: str) -> None:
        (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(model, "export", full)
    with pytest.raises(UserError, match=r"out: cannot be written \(.*pace.*\); make room, or choose another folder"):
        export_diffusers(weights, model, tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []


def test_a_folder_that_reads_back_otherwise_is_not_given_its_name(
    model: VideoModel, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = model.read_export
    monkeypatch.setattr(model, "read_export", lambda folder: read(folder) | {"proj_out.bias": torch.zeros(1)})
    with pytest.raises(UserError, match=r"reloading gives other tensors than were written: proj_out\.bias"):
        export_diffusers(weights, model, tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []
