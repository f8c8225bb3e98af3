"""An exported folder is whole, loads in diffusers alone, and holds exactly the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from sgmd_dist.assemble import build_model
from sgmd_dist.errors import UserError
from sgmd_dist.export import export_diffusers
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


@pytest.mark.parametrize("name", ["file/out", "busy"])
def test_a_place_that_cannot_be_written_is_named(
    model: VideoModel, weights: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    for file in ("file", "busy.tmp"):
        (tmp_path / file).write_text("mine")
    with pytest.raises(UserError, match=rf"{name}: cannot be written .*; choose another folder"):
        export_diffusers(weights, model, tmp_path / name)
    assert (tmp_path / "busy.tmp").read_text() == "mine"


def test_a_folder_that_reads_back_otherwise_is_not_given_its_name(
    model: VideoModel, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = model.read_export
    monkeypatch.setattr(model, "read_export", lambda folder: read(folder) | {"proj_out.bias": torch.zeros(1)})
    with pytest.raises(UserError, match=r"reloading gives other tensors than were written: proj_out\.bias"):
        export_diffusers(weights, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
