"""Image to video on ranks: shards carry the image, sharded training equals plain training, and its export is diffusers'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from ranks import run_ranks
from reference import Reference
from running import State, parameter_difference, train
from test_dry_run import dry
from torch import Tensor

from sgmd_dist.assemble import load_weights
from sgmd_dist.batch import Batch
from sgmd_dist.data.format import write_negative_prompt
from sgmd_dist.data.index import consolidate
from sgmd_dist.data.shards import ShardWriter
from sgmd_dist.dryrun import check_equal
from sgmd_dist.export import export_diffusers
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.sampling import open_source

TOLERANCE = 1e-6
SHAPE = (3, 3, 8, 8)
NUM_EMBEDS, EMBED_DIM = 5, 10
LAYOUTS = {"2 ranks": (2, []), "ulysses 2": (2, ["parallel.ulysses=2"])}
_references: dict[str, State] = {}


class ImageReference(Reference):
    """The plain trainer, whose networks see the image of the micro-batch in work."""

    def rollout(self, batch: Batch, *args: object) -> tuple[Tensor, Tensor]:
        self.batch = batch
        return super().rollout(batch, *args)  # type: ignore[arg-type]

    def fake_loss(self, batch: Batch, x_g: Tensor, update: int) -> Tensor:
        self.batch = batch
        return super().fake_loss(batch, x_g, update)

    def velocity(self, network: torch.nn.Module, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        if isinstance(network, torch.nn.ModuleDict):
            [name] = {"high" if s >= 0.875 else "low" for s in sigma.tolist()}
            network = network[name]
        mask = torch.zeros(len(x), 4, *SHAPE[1:])
        mask[:, :, :1] = 1.0
        seen = torch.cat([x, mask, self.batch.condition_latents.float()], 1)
        if network.config.image_dim is None:
            return network(seen, 1000 * sigma, text.float(), return_dict=False)[0]
        text = torch.cat([text.float(), torch.zeros(len(x), 512 - text.shape[1], text.shape[2])], 1)
        return network(seen, 1000 * sigma, text, self.batch.image_embeds.float(), return_dict=False)[0]


def save_network(folder: Path, seed: int, **image: int) -> None:
    torch.manual_seed(seed)
    WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=10, out_channels=3, text_dim=32,
        freq_dim=16, ffn_dim=40, num_layers=2, rope_max_seq_len=32, **image,
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, wan_folder: Path) -> dict[str, Path]:
    """Pipelines as Wan2.1-I2V's, with image embeddings, and as Wan2.2-I2V-A14B's, with two experts and none."""
    found = {name: tmp_path_factory.mktemp("i2v") / name for name in ("2.1", "2.2")}
    for folder in found.values():
        shutil.copytree(wan_folder, folder, ignore=shutil.ignore_patterns("transformer"))
    save_network(found["2.1"] / "transformer", 0, image_dim=EMBED_DIM, added_kv_proj_dim=24)
    save_network(found["2.2"] / "transformer", 1)
    save_network(found["2.2"] / "transformer_2", 2)
    index = {"_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.875}
    (found["2.2"] / "model_index.json").write_text(json.dumps(index))
    return found


@pytest.fixture(scope="module")
def image_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions with images and their embeddings, no videos."""
    folder = tmp_path_factory.mktemp("images") / "shards"
    torch.manual_seed(0)
    with ShardWriter(folder, latent_shape=SHAPE, bucket="images", samples_per_shard=16) as writer:
        for number in range(32):
            image = {"condition_latents": torch.randn(SHAPE), "image_embeds": torch.randn(NUM_EMBEDS, EMBED_DIM)}
            writer.add(f"{number:04d}", torch.randn(2 + number % 5, 32), "a caption", **image)
    write_negative_prompt(folder, torch.randn(2, 32))
    consolidate(folder)
    return folder


def reference(recipe_path: Path, which: str, overrides: list[str]) -> State:
    """The plain trainer's result, computed once per model."""
    if which not in _references:
        torch.set_num_threads(1)
        _references[which] = ImageReference(load_recipe(recipe_path, overrides)).train()
    return _references[which]


def test_recipes_of_image_to_video_train_as_one_plain_process(
    recipe_path: Path, folders: dict[str, Path], image_shards: Path, tmp_path: Path
) -> None:
    for which, layouts in {"2.1": ["2 ranks", "ulysses 2"], "2.2": ["2 ranks"]}.items():
        overrides = [f"model.pretrained={folders[which]}", f"data.shards={image_shards}", "run.steps=2"]
        for layout in layouts:
            ranks, parallel = LAYOUTS[layout]
            here = [*overrides, *parallel, f"run.dir={tmp_path}/{which}-{ranks}-{len(parallel)}"]
            state = run_ranks(ranks, train, recipe_path, here)[0]
            expected = reference(recipe_path, which, overrides)
            found = {name: part for name, part in state.items() if not name.endswith(".optimizer")}
            assert parameter_difference(found, expected) < TOLERANCE, (which, layout)
        source = open_source(Path(here[-1].removeprefix("run.dir=")))
        weights = load_weights(source.checkpoint, "generator", source.model)
        export_diffusers(weights, source.model, tmp_path / f"{which}-export")
        again = source.model.read_export(tmp_path / f"{which}-export")
        assert all(torch.equal(again[name], state["generator"][name]) for name in state["generator"])


def test_a_dry_run_shows_ranks_that_agree(recipe_path: Path, folders: dict[str, Path], image_shards: Path) -> None:
    traces = dry(recipe_path, [f"model.pretrained={folders['2.1']}", f"data.shards={image_shards}"], 2, [0, 1])
    check_equal(traces)
    assert all(part.collectives for part in traces[0].last_step)
