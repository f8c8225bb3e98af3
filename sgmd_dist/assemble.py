"""From a recipe to its objective, its models and their sharded networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from loguru import logger
from torch import Tensor, nn

from sgmd_dist import adapters, checkpoint, heads, registry
from sgmd_dist.adapters import Lora, lora_from
from sgmd_dist.errors import UserError
from sgmd_dist.lowrank import LowRank, low_rank
from sgmd_dist.models.base import VideoModel
from sgmd_dist.objectives.base import Objective
from sgmd_dist.parallel.apply import parallelize, share_streams
from sgmd_dist.parallel.load import Loaded, fill, load_safetensors
from sgmd_dist.parallel.mesh import Mesh
from sgmd_dist.recipe import HeadSection, Recipe
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.rollout import Network

Which = Literal["generator", "generator.ema", "fake_score"]

_ONLY = "only"  # an adapter's name in a network that has no other


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


def lora_of(recipe: Recipe, role: str, model: VideoModel) -> Lora | None:
    """The adapter of `role`; None where the role has a network of its own.

    Raises:
        UserError: it names layers that the model does not have.
    """
    section = recipe.model.lora_of(role)
    return None if section is None else lora_from(section, model.lora_targets(), f"model.{role}.lora")


def head_of(recipe: Recipe, role: str, model: VideoModel) -> HeadSection | None:
    """The head that the objective puts on the network of `role`; None where it needs none.

    Raises:
        UserError: the head reads blocks that the network does not have, or the role trains an adapter.
    """
    section = recipe.objective.head_of(role)
    if section is None:
        return None
    if recipe.model.lora_of(role) is not None:
        raise UserError(
            f"model.{role}.lora: {section.key} puts a head on this role's network, which an adapter shares with other"
            f" roles; remove the adapter, or turn {section.key} off with {section.key}.weight=0"
        )
    heads.read_blocks(section, model.attention_shape().num_blocks)
    return section


@dataclass
class NetworkPlan:
    """A network before it is built, and the roles that run it, each with its adapter or None.

    `head`: what the objective puts on the network of a trained role, or None.
    """

    model: VideoModel
    dtype: str
    is_frozen: bool
    roles: dict[str, Lora | None] = field(default_factory=dict)
    head: HeadSection | None = None

    @property
    def loras(self) -> dict[str, Lora]:
        """The adapters by their roles."""
        return {role: lora for role, lora in self.roles.items() if lora is not None}

    def may_serve(self, other: NetworkPlan) -> bool:
        """True where one copy of the weights is enough for both."""
        weights, others = ((n.model.weight_files(), n.model.config, n.model.boundaries, n.dtype) for n in (self, other))
        return self.is_frozen and other.is_frozen and weights == others


def plan_networks(
    recipe: Recipe, names: Mapping[str, bool], model_of: Callable[[Recipe, str], VideoModel] = build_model
) -> list[NetworkPlan]:
    """Which roles share which network: frozen roles and roles with an adapter do where their weights are the same.

    Args:
        names: the roles, and whether each is trained.
        model_of: `build_model`, or `build_architecture`.

    Raises:
        UserError: a pretrained folder, an adapter or a head does not fit, the family cannot do what the recipe asks, or
            the offloaded teacher is an adapter's base.
    """
    plans: list[NetworkPlan] = []
    for name, is_trained in names.items():
        model = model_of(recipe, name)
        _check_family(recipe, model)
        lora = lora_of(recipe, name, model)
        dtype = recipe.model.for_role(name if lora is None else "teacher").dtype or "float32"
        head = head_of(recipe, name, model)
        wanted = NetworkPlan(model, dtype, is_frozen=not is_trained or lora is not None, head=head)
        plan = next((known for known in plans if known.may_serve(wanted)), wanted)
        if plan is wanted:
            plans.append(plan)
        plan.roles[name] = lora
    for plan in plans:
        if is_offloaded(recipe, plan) and plan.loras:
            keys = " and ".join(f"model.{name}.lora" for name in plan.loras)
            raise UserError(
                f"parallel.teacher_offload = true: the teacher's network is the base of {keys} too, which trains on the"
                " device; set it to false"
            )
    return plans


def _check_family(recipe: Recipe, model: VideoModel) -> None:
    """Refuse what the model's family cannot do: ranks that share a sequence, or prompts of another length."""
    encoding, tokens = model.text_encoding, recipe.model.text_tokens
    if encoding is not None and encoding.keeps_padding and tokens != encoding.max_tokens:
        raise UserError(
            f"model.text_tokens = {tokens}: expected {encoding.max_tokens}: the padding of prompts is a part of this"
            " network's sequence"
        )
    for axis in ("ulysses", "ring"):
        size = getattr(recipe.parallel, axis)
        if size > 1 and not model.splits_sequences:
            raise UserError(
                f"parallel.{axis} = {size}: model.family = {recipe.model.family} has no sequence parallelism; set"
                f" parallel.{axis} to 1: its ranks become data-parallel ones"
            )


def build_networks(recipe: Recipe, mesh: Mesh, names: Mapping[str, bool]) -> dict[str, tuple[nn.Module, VideoModel]]:
    """The roles' networks: meta device -> parallelize -> sharded load. No rank ever holds a whole network.

    Args:
        names: the roles, and whether each is trained; some may get the same module, see `plan_networks`.
    """
    plans, modules = plan_networks(recipe, names), []
    for plan in plans:
        module = build_meta_network(recipe, mesh, plan)
        materialize(module, plan.model, mesh.device, offload=is_offloaded(recipe, plan))
        _fill_as_planned(module, plan, recipe.run.seed)
        modules.append(module)
    return networks_by_role(modules, plans, names)


def networks_by_role(
    modules: Sequence[nn.Module], plans: Sequence[NetworkPlan], names: Iterable[str]
) -> dict[str, tuple[nn.Module, VideoModel]]:
    """Each role's network, on streams that all networks share."""
    planned = list(zip(modules, plans, strict=True))
    share_streams(network for module, plan in planned for network in plan.model.networks(module))
    found = {role: (module, plan.model) for module, plan in planned for role in plan.roles}
    return {name: found[name] for name in names}


def build_meta_network(recipe: Recipe, mesh: Mesh, plan: NetworkPlan) -> nn.Module:
    """A network with its adapters and its head, parallelized and still on the meta device."""
    with torch.device("meta"):
        # Not by diffusers' `to`, which warns of what loading decides.
        module = nn.Module.to(plan.model.build(), getattr(torch, plan.dtype))
        if plan.head is not None:
            heads.inject(module, plan.model, plan.head)
    for name, lora in plan.loras.items():
        adapters.inject(module, name, lora)
    return parallelize(
        module,
        plan.model,
        recipe.parallel,
        mesh=mesh,
        compute_dtype=getattr(torch, recipe.model.compute_dtype),
        offload=is_offloaded(recipe, plan),
    )


def materialize(module: nn.Module, model: VideoModel, device: torch.device, *, offload: bool = False) -> None:
    """Give the sharded parameters of a meta network storage on `device`, or on the host where they are offloaded,
    uninitialized, and its buffers values."""
    module.to_empty(device="cpu" if offload else device)
    model.reset_buffers(module, device)


def is_offloaded(recipe: Recipe, plan: NetworkPlan) -> bool:
    """Whether the network's shards stay on the host."""
    return recipe.parallel.teacher_offload and "teacher" in plan.roles


def _fill_as_planned(module: nn.Module, plan: NetworkPlan, seed: int) -> None:
    of_heads = heads.parameters(module)
    base = {name: p for name, p in adapters.base_parameters(module).items() if name not in of_heads}
    _log_weights(", ".join(plan.roles), _fill_with_weights(base, plan.model, seed), len(base), plan.model)
    if of_heads:
        count = fill(of_heads, partial(heads.initial_value, seed=seed))
        logger.info("{}: {} tensors of a new head", ", ".join(plan.roles), count)
    for name, lora in plan.loras.items():
        count = fill(adapters.adapter_parameters(module, name), partial(adapters.initial_value, name, seed=seed))
        logger.info("{}: {} tensors of a new adapter, rank {}, scale {:g}", name, count, lora.rank, lora.scale)
    if plan.loras and not plan.model.weight_files():
        logger.warning("adapters on random weights learn nothing where the last layer is zero: set model.pretrained")


def _fill_with_weights(parameters: Mapping[str, Tensor], model: VideoModel, seed: int) -> Loaded | None:
    """Set a network's parameters from the model's files, or from `seed` where it has none: None then."""
    if files := model.weight_files():
        image = model.image_input
        return load_safetensors(parameters, files, () if image is None else image.unused_tensors)
    fill(parameters, partial(model.initial_value, seed=seed))
    return None


def _log_weights(roles: str, found: Loaded | None, num_tensors: int, model: VideoModel) -> None:
    if found is None:
        logger.info("{}: {} tensors of random weights", roles, num_tensors)
        return
    folders = ", ".join(dict.fromkeys(str(path.parent) for paths in model.weight_files().values() for path in paths))
    logger.info(
        "{}: {} tensors from {}, {:.3f} GB, checksum {:016x}",
        roles,
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


def load_weights(
    path: Path, which: Which, model: VideoModel, lora: Lora | None = None, head: HeadSection | None = None
) -> dict[str, Tensor]:
    """Full float32 tensors of one network of a checkpoint, on the CPU, by this process alone.

    Args:
        lora: the role's adapter, whose tensors alone are in the checkpoint then, and in the result.
        head: the one that the network was trained with; the result is without it.

    Raises:
        UserError: the checkpoint is missing, damaged or of another network.
    """
    with torch.device("meta"):
        module = model.build()
        if head is not None:
            heads.inject(module, model, head)
    if lora is not None:
        adapters.inject(module, _ONLY, lora)
    parameters = module.named_parameters() if lora is None else adapters.adapter_parameters(module, _ONLY).items()
    tensors = checkpoint.load_tree(path, which, {name: p.shape for name, p in parameters})
    of_heads = heads.parameters(module)
    return {name: tensor for name, tensor in tensors.items() if name not in of_heads}


def base_weights(model: VideoModel, seed: int) -> dict[str, Tensor]:
    """Full float32 tensors of the model's pretrained files, on the CPU.

    Args:
        seed: of random weights, where the model has no files.

    Raises:
        UserError: the files do not fit the network.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in model.build().named_parameters()}
    base = {name: torch.empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
    _fill_with_weights(base, model, seed)
    return base


def merge_adapter(model: VideoModel, weights: Mapping[str, Tensor], lora: Lora, seed: int) -> dict[str, Tensor]:
    """`base_weights` with the adapter `weights` added."""
    return adapters.merged(base_weights(model, seed), weights, lora.scale)


def low_rank_adapter(
    model: VideoModel, weights: Mapping[str, Tensor], rank: int, device: torch.device
) -> tuple[Lora, LowRank]:
    """The difference of trained `weights` from the pretrained ones as an adapter on every linear layer.

    Raises:
        UserError: there are no pretrained files, no linear layer changed, or none has so high a rank.
    """
    if not model.weight_files():
        raise UserError(
            f"--svd-rank {rank}: model.generator.pretrained and model.pretrained = null: the run began from random"
            " weights, which nobody else has; leave out --svd-rank"
        )
    with torch.device("meta"):
        module = model.build()
    highest = max(min(layer.weight.shape) for layer in module.modules() if isinstance(layer, nn.Linear))
    if rank > highest:
        raise UserError(
            f"--svd-rank {rank}: no linear layer of this model has a rank above {highest}; give at most that"
        )
    found = low_rank(weights, base_weights(model, 0), _linear_layers(module), rank, device)
    if not found.energies:
        raise UserError(f"--svd-rank {rank}: the weights are those that the run began from; nothing to export")
    return Lora(rank, rank, tuple(_linear_layers(model.networks(module)[0]))), found


def _linear_layers(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]


def load_network(
    model: VideoModel,
    weights: Mapping[str, Tensor] | None,
    device: torch.device,
    seed: int = 0,
    lora: Lora | None = None,
) -> Network:
    """An unsharded, frozen network ready to be called.

    Args:
        weights: full tensors by name; None takes the model's pretrained files, or without any random weights of `seed`.
        lora: says that `weights` are an adapter's, which then hangs on those files' weights.
    """
    with torch.device("meta"):
        module = nn.Module.to(model.build(), model.compute_dtype)
    if lora is not None:
        adapters.inject(module, _ONLY, lora, model.compute_dtype)
    module.to_empty(device=device)
    model.reset_buffers(module, device)
    if weights is None or lora is not None:
        _fill_with_weights(adapters.base_parameters(module), model, seed)
    if weights is not None and lora is not None:
        fill(adapters.adapter_parameters(module, _ONLY), lambda name, _: weights[name])
        adapters.Switch(module).activate(_ONLY)
    elif weights is not None:
        module.load_state_dict(weights)
    module.requires_grad_(False).eval()
    return partial(model.velocity, module)
