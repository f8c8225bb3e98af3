"""A fine-tune's change as a LoRA: exact where its rank is small, the best possible where it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from sgmd_dist.assemble import base_weights, build_model, low_rank_adapter
from sgmd_dist.errors import UserError
from sgmd_dist.export import export_adapter, export_diffusers
from sgmd_dist.lowrank import low_rank, truncated
from sgmd_dist.models.base import VideoModel
from sgmd_dist.recipe import Recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(24, 36), (36, 24), (200, 150)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_no_matrix_of_the_rank_is_nearer(shape: tuple[int, int], rank: int) -> None:
    """Eckart and Young: the nearest one misses the root of the squares of the other singular values."""
    generator = torch.Generator().manual_seed(0)
    decay = torch.arange(1, 201) ** -0.5
    change = torch.randn(shape, generator=generator) * decay[: shape[1]]
    a, b = truncated(change, rank, "layer")
    values = torch.linalg.svdvals(change.double())
    assert a.shape == (rank, shape[1]) and b.shape == (shape[0], rank)
    assert (change - b @ a).norm().item() == pytest.approx(values[rank:].norm().item(), rel=1e-4)


def test_a_rank_beyond_the_matrix_is_filled_up_with_zeros() -> None:
    change = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    a, b = truncated(change, 5, "layer")
    assert a.shape == (5, 7) and b.shape == (3, 5)
    torch.testing.assert_close(b @ a, change)
    assert not a[3:].any() and not b[:, 3:].any()


def test_a_layer_without_change_is_zero() -> None:
    a, b = truncated(torch.zeros(6, 8), 2, "layer")
    assert not (b @ a).any() and bool(torch.isfinite(a).all() and torch.isfinite(b).all())


def test_the_report_tells_what_is_kept_and_what_is_left_out() -> None:
    base = {name: torch.zeros(4, 4) for name in ("q.weight", "k.weight", "v.weight")}
    base |= {"q.bias": torch.zeros(4), "k.bias": torch.zeros(4), "norm.weight": torch.ones(4), "table": torch.zeros(4)}
    tuned = dict(base)
    tuned["q.weight"] = torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0]))  # keeps 4 of 5
    tuned["k.weight"] = torch.diag(torch.tensor([3.0, 0.0, 0.0, 0.0]))
    tuned |= {"q.bias": torch.ones(4), "k.bias": torch.ones(4), "table": torch.ones(4)}
    found = low_rank(tuned, base, ["q", "k", "v"], 1)
    assert found.energies == pytest.approx({"q": 0.8, "k": 1.0}, rel=1e-5)
    assert found.left_out == {"q.bias": 4.0, "k.bias": 4.0, "table": 4.0} and found.total == 26.0
    assert found.report() == (
        "of the change of 2 linear layers, squared, kept: 0.9000 in the mean, 0.8000 at least (q); left out, 0.46 of"
        " the whole change: 2 biases, table"
    )
    assert low_rank(tuned, tuned | {"k.weight": base["k.weight"]}, ["k"], 1).report().endswith("; nothing else changed")


# Of a network, in diffusers


@pytest.fixture
def model(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> VideoModel:
    """With pretrained weights: random ones, biases and output projection too."""
    begun = build_model(tiny_recipe(), "generator")
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        named = list(begun.build().named_parameters())
    weights = {name: torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5 for name, p in named}
    export_diffusers(weights, begun, tmp_path / "pretrained")
    return build_model(tiny_recipe(f"model.pretrained={tmp_path / 'pretrained'}"), "generator")


def tuned_by(model: VideoModel, rank: int) -> dict[str, Tensor]:
    """The pretrained weights with a change of `rank` in every linear layer."""
    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        linear = [name for name, layer in model.build().named_modules() if isinstance(layer, torch.nn.Linear)]
    weights = base_weights(model, 0)
    for name in linear:
        height, width = weights[f"{name}.weight"].shape
        left, right = torch.randn(height, rank, generator=generator), torch.randn(rank, width, generator=generator)
        weights[f"{name}.weight"] += left @ right / width**0.5 / 4
    return weights


def run(transformer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    latents, text = torch.randn(2, 3, 3, 4, 6, generator=generator), torch.randn(2, 8, 32, generator=generator)
    with torch.no_grad():
        return transformer(latents, torch.tensor([300.0, 900.0]), text, return_dict=False)[0]


@pytest.mark.parametrize("original, file", [(False, "pytorch_lora_weights.safetensors"), (True, "lora.safetensors")])
def test_a_change_of_small_rank_is_reproduced_by_the_stock_pipeline(
    model: VideoModel, tmp_path: Path, original: bool, file: str
) -> None:
    weights = tuned_by(model, 3)
    lora, found = low_rank_adapter(model, weights, 3, CPU)
    assert min(found.energies.values()) == pytest.approx(1, abs=1e-5) and found.left_out == {}
    export_adapter(found.adapter, lora, model, tmp_path / "lora", original=original)
    base = WanTransformer3DModel.from_pretrained(tmp_path / "pretrained", local_files_only=True)
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": None}
    pipeline = WanPipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=cast(Any, base))
    before = run(base)
    pipeline.load_lora_weights(str(tmp_path / "lora"), weight_name=file, local_files_only=True)
    export_diffusers(weights, model, tmp_path / "whole")
    expected = run(WanTransformer3DModel.from_pretrained(tmp_path / "whole", local_files_only=True))
    assert (expected - before).abs().max() > 0.1
    assert (run(base) - expected).abs().max() < 1e-5


def test_a_pair_of_experts_gets_an_adapter_for_each(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    random = build_model(tiny_recipe("model.boundary_ratio=0.875"), "generator")
    export_diffusers(base_weights(random, 0), random, tmp_path / "pair")
    model = build_model(tiny_recipe(f"model.pretrained={tmp_path / 'pair'}"), "generator")
    weights = tuned_by(model, 2)
    lora, found = low_rank_adapter(model, weights, 2, CPU)
    assert {layer.partition(".")[0] for layer in found.energies} == {"high", "low"}
    assert all(not target.startswith(("high.", "low.")) for target in lora.targets)
    assert export_adapter(found.adapter, lora, model, tmp_path / "lora") == 2 * len(found.energies)


def test_there_is_nothing_to_take_the_difference_from(tiny_recipe: Callable[..., Recipe], model: VideoModel) -> None:
    random = build_model(tiny_recipe(), "generator")
    with pytest.raises(UserError, match=r"--svd-rank 4: model\.generator\.pretrained and model\.pretrained = null"):
        low_rank_adapter(random, base_weights(random, 0), 4, CPU)
    with pytest.raises(UserError, match=r"--svd-rank 4: the weights are those that the run began from"):
        low_rank_adapter(model, base_weights(model, 0), 4, CPU)
