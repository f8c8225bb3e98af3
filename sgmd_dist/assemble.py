"""From a recipe to its objective, its models and their sharded networks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from loguru import logger
from torch import Tensor, nn

from sgmd_dist import checkpoint, registry
from sgmd_dist.models.base import VideoModel
from sgmd_dist.objectives.base import Objective
from sgmd_dist.parallel.apply import parallelize, share_streams
from sgmd_dist.parallel.load import fill, load_safetensors
from sgmd_dist.parallel.mesh import Mesh
from sgmd_dist.recipe import Recipe
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.rollout import Network

Which = Literal["generator", "generator.ema", "fake_score"]

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def build_objective(recipe: Recipe) -> Objective:
    """The objective that `recipe.objective` names."""
    return registry.load(registry.OBJECTIVES, recipe.objective.name).build(recipe.objective)


def build_model(recipe: Recipe, role: str) -> VideoModel:
    """The model of `role`, with its weight files.

    Raises:
        UserError: its pretrained folder is missing or unfit.
    """
    return registry.load(registry.MODELS, recipe.model.family).build(recipe.model, *_pretrained(recipe, role))


def build_architecture(recipe: Recipe, role: str) -> VideoModel:
    """The model of `role` for plans and dry runs: where its pretrained folder is not there, `model.config` tells.

    Raises:
        UserError: the folder is unfit, or missing and `model.config` does not describe it.
    """
    return registry.load(registry.MODELS, recipe.model.family).architecture(recipe.model, *_pretrained(recipe, role))


def _pretrained(recipe: Recipe, role: str) -> tuple[str | None, str]:
    """The folder of `role` and the key that gives it."""
    own = getattr(recipe.model, role).pretrained
    key = f"model.{role}.pretrained" if own else "model.pretrained"
    return recipe.model.for_role(role).pretrained, key


def build_networks(recipe: Recipe, mesh: Mesh, names: Mapping[str, bool]) -> dict[str, tuple[nn.Module, VideoModel]]:
    """The roles' networks: meta device -> parallelize -> sharded load. No rank ever holds a whole network."""
    networks: dict[str, tuple[nn.Module, VideoModel]] = {}
    for name in names:
        model = build_model(recipe, name)
        module = build_meta_network(recipe, mesh, name, model)
        materialize(module, model, mesh.device, offload=is_offloaded(recipe, name))
        _fill_with_weights(name, module, model, recipe.run.seed)
        networks[name] = (module, model)
    share_streams(network for module, model in networks.values() for network in model.networks(module))
    return networks


def build_meta_network(recipe: Recipe, mesh: Mesh, name: str, model: VideoModel) -> nn.Module:
    """The network of role `name`, parallelized and still on the meta device."""
    dtype = _DTYPES[recipe.model.for_role(name).dtype or "float32"]
    with torch.device("meta"):
        module = nn.Module.to(model.build(), dtype)  # diffusers' own `to` warns of what loading decides anyway
    return parallelize(
        module,
        model,
        recipe.parallel,
        mesh=mesh,
        compute_dtype=_DTYPES[recipe.model.compute_dtype],
        offload=is_offloaded(recipe, name),
    )


def materialize(module: nn.Module, model: VideoModel, device: torch.device, *, offload: bool = False) -> None:
    """Give the sharded parameters of a meta network storage on `device`, or on the host where they are offloaded,
    uninitialized, and its buffers values."""
    module.to_empty(device="cpu" if offload else device)
    model.reset_buffers(module, device)


def is_offloaded(recipe: Recipe, role: str) -> bool:
    """Whether the role's shards stay on the host."""
    return recipe.parallel.teacher_offload and role == "teacher"


def _fill_with_weights(name: str, module: nn.Module, model: VideoModel, seed: int) -> None:
    files = model.weight_files()
    if not files:
        count = fill(module, lambda key, shape: model.initial_value(key, shape, seed))
        logger.info("{}: {} tensors of random weights", name, count)
        return
    found = load_safetensors(dict(module.named_parameters()), files)
    folders = ", ".join(dict.fromkeys(str(path.parent) for paths in files.values() for path in paths))
    logger.info(
        "{}: {} tensors from {}, {:.3f} GB, checksum {:016x}",
        name,
        found.num_tensors,
        folders,
        found.num_bytes / 1e9,
        found.checksum % 2**64,
    )


def model_of_checkpoint(path: Path, role: str = "generator") -> tuple[Recipe, VideoModel]:
    """The recipe that a checkpoint was saved with, and the architecture of `role`.

    Raises:
        UserError: the recipe or the pretrained folder that it names is missing.
    """
    recipe = load_recipe(path / checkpoint.RECIPE_FILE)
    return recipe, build_model(recipe, role)


def load_weights(path: Path, which: Which, model: VideoModel) -> dict[str, Tensor]:
    """Full float32 tensors of one network of a checkpoint, on the CPU, without a process group.

    Raises:
        UserError: the checkpoint is missing, damaged or of another network.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in model.build().named_parameters()}
    return checkpoint.load_tree(path, which, shapes)


def load_network(
    model: VideoModel, weights: Mapping[str, Tensor] | None, device: torch.device, seed: int = 0
) -> Network:
    """An unsharded, frozen network ready to be called.

    Args:
        weights: full tensors by name; None takes the model's pretrained files, or without any random weights of `seed`.
    """
    with torch.device("meta"):
        module = nn.Module.to(model.build(), model.compute_dtype)
    module.to_empty(device=device)
    model.reset_buffers(module, device)
    if weights is not None:
        module.load_state_dict(weights)
    elif files := model.weight_files():
        load_safetensors(dict(module.named_parameters()), files)
    else:
        fill(module, lambda name, shape: model.initial_value(name, shape, seed))
    module.requires_grad_(False).eval()
    return functools.partial(model.velocity, module)
