"""The networks of a run and what trains them. Freezing between phases happens here and nowhere else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Shard

from sgmd_dist import flow, heads
from sgmd_dist.adapters import Switch, adapter_parameters
from sgmd_dist.conditions import Condition, TextAndImage
from sgmd_dist.models.base import LatentShape, RunnableModel
from sgmd_dist.recipe import AdamWSection, LrScheduleSection, OptimSection
from sgmd_dist.shard import local

WARM_UP_TOKENS = 1


class Ema:
    """Exponential moving average of a role's parameters, sharded as they are."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.shadow: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """shadow <- decay shadow + (1 - decay) parameters, which are those that the shadow was made of."""
        shadows, values = ([*map(local, tensors.values())] for tensors in (self.shadow, parameters))
        torch._foreach_lerp_(shadows, values, 1 - decay)

    @torch.no_grad()
    def exchange(self, parameters: Mapping[str, Tensor]) -> None:
        """Give the average's values to the parameters and theirs to the average, tensor by tensor and bit by bit."""
        for name, shadow in self.shadow.items():
            mine, other = local(shadow), local(parameters[name])
            kept = other.clone()
            other.copy_(mine)
            mine.copy_(kept)


class Call(NamedTuple):
    """A kind of call of a network: latents of `shape` `[B, C, F, H, W]`, and what its backward pass gives gradients to.

    Without either there is no graph. `expert` numbers the network that ran, from the lowest noise levels up.
    `trains_adapter`: the backward pass is one through the inputs, with an adapter's gradients on the way.
    """

    shape: tuple[int, ...]
    for_input: bool
    for_weights: bool
    expert: int = 0
    trains_adapter: bool = False

    def passes(self, *, recomputes: bool) -> int:
        """Sample-passes that the call leads to: forward 1, recompute 1, input and weight gradients 1 each.

        Weight gradients need those of the layers' inputs.
        """
        backward = int(self.for_input or self.for_weights) + int(self.for_weights)
        return self.shape[0] * (1 + backward + int(backward > 0 and recomputes))


class ShardedAdamW(torch.optim.AdamW):
    """AdamW whose arithmetic runs on this rank's shards. Its state is sharded as the parameters are.

    The update is elementwise, and on DTensors most of a small network's would be spent on their bookkeeping.

    Attributes:
        found_inf: a scalar on the device; 1 makes the next `step` one that changes nothing (torch's fused kernels).
    """

    found_inf: Tensor

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:  # parameters, gradients, moments, steps: what `step` hands to the kernel
            tensors[:] = map(local, tensors)
        return has_complex


class Role:
    """One network: its module, and for a trained role its optimizer and, for the generator, an EMA.

    A role is called as a network: `role(x_sigma, sigma, condition, level)` gives the velocity in float32.

    Roles may share a module that has adapters: each runs it with the adapter of its own name, or with none, and trains
    that adapter alone.

    Attributes:
        parameters: what training this role changes, sharded, by name: the adapter's tensors, or the whole module's.
    """

    def __init__(self, name: str, module: nn.Module, model: RunnableModel, *, recomputes: bool = False) -> None:
        self.name = name
        self.module = module
        self.model = model
        self.optimizer: ShardedAdamW | None = None
        self.ema: Ema | None = None
        self.calls: Counter[Call] = Counter()
        self._switch = Switch(module)
        self.adapter = name if name in self._switch.adapters else None
        self.parameters: dict[str, nn.Parameter] = (
            adapter_parameters(module, name) if self._switch.adapters else dict(module.named_parameters())
        )
        self._recomputes = recomputes
        self._heads = heads.heads_of(module)
        self._units = [part for part in module.modules() if isinstance(part, FSDPModule)]
        self._lr: AdamWSection | None = None

    def __call__(self, x_sigma: Tensor, sigma: Tensor, condition: Condition, level: float | None = None) -> Tensor:
        self.calls[self._kind_of(x_sigma, level)] += 1
        return self.run(x_sigma, sigma, condition, level)

    def judge(
        self,
        x_sigma: Tensor,
        sigma: Tensor,
        condition: Condition,
        level: float | None = None,
        *,
        detached: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """A call that gives the velocity and, by the head on the network's blocks, a logit per sample `[B]`.

        Args:
            detached: whether a backward pass from the logits ends in the head.
        """
        latent_shape = cast(LatentShape, tuple(x_sigma.shape[1:]))
        with heads.asked(self._heads, latent_shape, detached=detached) as logits:
            velocity = self(x_sigma, sigma, condition, level)
        [of_samples] = logits
        return velocity, of_samples

    def run(self, x_sigma: Tensor, sigma: Tensor, condition: Condition, level: float | None = None) -> Tensor:
        """A call that is not counted."""
        with self._switch.using(self.adapter):
            return self.model.velocity(self.module, x_sigma, sigma, condition, level)

    def _kind_of(self, x_sigma: Tensor, level: float | None) -> Call:
        """An adapter's weight gradients are too small to count: its backward pass is one through the base's inputs."""
        has_graph = torch.is_grad_enabled()
        is_training = has_graph and self.is_training
        trains_adapter = is_training and self.adapter is not None
        for_input = has_graph and x_sigma.requires_grad or trains_adapter
        expert = 0 if level is None else sum(flow.reaches(level, boundary) for boundary in self.boundaries)
        return Call(tuple(x_sigma.shape), for_input, is_training and not trains_adapter, expert, trains_adapter)

    def passes(self) -> int:
        """Sample-passes that the calls so far lead to, those of their backward passes included."""
        return sum(count * call.passes(recomputes=self._recomputes) for call, count in self.calls.items())

    @property
    def boundaries(self) -> tuple[float, ...]:
        """The noise levels from which the network's next expert serves; none without experts."""
        return self.model.boundaries

    @property
    def is_training(self) -> bool:
        """True while this role's weights take gradients."""
        first = next(iter(self.parameters.values()), None)  # all or none do
        return first is not None and first.requires_grad

    def add_optimizer(self, section: AdamWSection) -> None:
        """Make the role trainable with AdamW on its (sharded) parameters; heads have a learning rate of their own."""
        self._lr = section
        of_heads = {id(p): head.lr_ratio for head in self._heads for p in head.parameters()}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters.values() if of_heads.get(id(p), 1.0) == ratio], "lr_ratio": ratio}
            for ratio in sorted({1.0, *of_heads.values()})
        ]
        self.optimizer = ShardedAdamW(
            groups,
            lr=section.lr.at(0),
            betas=section.betas,
            weight_decay=section.weight_decay,
            eps=section.eps,
            fused=True,
        )

    def set_requires_grad(self, value: bool) -> None:
        """Freeze or unfreeze the role's own weights, with every FSDP unit resharded first.

        A unit that is still gathered keeps gradients outside `param.grad`, where they would leak into the next
        update.
        """
        for unit in self._units:
            unit.reshard()
        if value != self.is_training:
            for parameter in self.parameters.values():
                parameter.requires_grad_(value)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Run the role with its average's weights inside the context, without a second network in memory.

        Weights and average trade places: nobody may read or write either meanwhile, as a save that copies them would.
        """
        assert self.ema is not None, f"{self.name} has no average"
        self._trade(self.ema)
        try:
            yield
        finally:
            self._trade(self.ema)

    def _trade(self, ema: Ema) -> None:
        for unit in self._units:  # one that is still gathered would run with the weights of before
            unit.reshard()
        ema.exchange(self.parameters)

    def step(self, step: int, max_grad_norm: float, lr_factor: float) -> Tensor:
        """Clip, update the weights, clear the gradients; returns the gradient norm before clipping (a scalar).

        A `max_grad_norm` of 0 means no clipping. Where the norm is not finite, which all ranks see alike, weights and
        moments stay as they are; nobody waits for the device to tell.
        """
        assert self.optimizer is not None and self._lr is not None, f"{self.name} is frozen"
        norm = _clip([p.grad for p in self.parameters.values() if p.grad is not None], max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr.lr.at(step) * lr_factor * group["lr_ratio"]
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


class Roles(Mapping[str, Role]):
    """The roles of a run by name; `train_only` says whose weights take gradients."""

    def __init__(self, roles: Mapping[str, Role], optim: OptimSection, num_steps: int) -> None:
        self._roles = dict(roles)
        self._optim = optim
        self._num_steps = num_steps

    def __getitem__(self, name: str) -> Role:
        return self._roles[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    @property
    def trained(self) -> list[Role]:
        """The roles that have an optimizer."""
        return [role for role in self.values() if role.optimizer is not None]

    @torch.no_grad()
    def warm_up(self, device: torch.device) -> None:
        """Run every network, of a model with experts each, once with trainable weights, then freeze all.

        FSDP2 settles a module's dtypes and streams at its first forward, from the parameters that require
        gradients then: a network first run frozen could not be trained later.
        """
        for role in self.values():
            role.set_requires_grad(True)
        for role in self.values():
            x = torch.zeros(1, *role.model.smallest_latents(), device=device)
            text = torch.zeros(1, WARM_UP_TOKENS, role.model.text_dim(), device=device)
            condition = with_blank_image(role.model, text, x)
            for level in (0.0, *role.boundaries):
                role(x, torch.full((1,), level, device=device), condition, level)
            role.calls.clear()
        self.train_only(None)

    def train_only(self, name: str | None) -> None:
        """Let the weights of role `name` take gradients and freeze all others; None freezes all.

        Call it only while no backward pass is pending.
        """
        for role in self.values():
            role.set_requires_grad(role.name == name)

    def step(self, name: str, step: int) -> Tensor:
        """End the phase that trains role `name`: clip, optimizer step, EMA; returns the gradient norm."""
        role = self[name]
        factor = lr_factor(self._optim.schedule, step, self._num_steps)
        norm = role.step(step, self._optim.max_grad_norm.at(step), factor)
        if role.ema is not None:
            ema = self._optim.ema
            role.ema.update(role.parameters, ema.decay.at(step) if step >= ema.start_step else 0.0)
        return norm

    def take_passes(self) -> dict[str, float]:
        """Sample-passes per role since the last call: forwards, recomputations and both kinds of backward."""
        counts = {name: float(role.passes()) for name, role in self.items()}
        for role in self.values():
            role.calls.clear()
        return counts


@torch.no_grad()
def _clip(gradients: list[Tensor], max_norm: float) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, on this rank's shards and with one reduction of the norm."""
    norm = _total_norm(gradients)
    if max_norm:
        torch._foreach_mul_([*map(local, gradients)], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients, which are sharded alike or not at all."""
    if not gradients:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([*map(local, gradients)])))
    first = gradients[0]
    if not isinstance(first, DTensor):
        return norm
    parts = [Partial() if isinstance(placement, Shard) else placement for placement in first.placements]
    return DTensor.from_local(norm**2, first.device_mesh, parts).full_tensor().sqrt()


def with_blank_image(model: RunnableModel, text: Tensor, x: Tensor) -> Condition:
    """A condition of texts `[B, T, D]` beside latents `x`, with an image of zeros where the model takes one."""
    image = model.image_input
    if image is None:
        return text
    embeds = text.new_zeros(len(x), image.num_embeds, image.embed_dim) if image.embed_dim else None
    return TextAndImage(text, torch.zeros_like(x, dtype=text.dtype), embeds)


def lr_factor(section: LrScheduleSection, step: int, num_steps: int) -> float:
    """The factor of `optim.schedule` on every learning rate at optimizer step `step` (from 0)."""
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    if section.name == "constant":
        return 1.0
    progress = min((step - section.warmup_steps) / max(num_steps - section.warmup_steps, 1), 1.0)
    remaining = 1 - progress if section.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return section.final_ratio + (1 - section.final_ratio) * remaining


def build_roles(
    modules: Mapping[str, tuple[nn.Module, RunnableModel]],
    trained: set[str],
    optim: OptimSection,
    num_steps: int,
    *,
    recomputes: bool,
) -> Roles:
    """Roles from loaded networks: optimizers for those in `trained`, an EMA for the generator.

    Args:
        recomputes: True where activation checkpointing repeats each forward in the backward pass.
    """
    roles: dict[str, Role] = {}
    sections: dict[str, Any] = {"generator": optim.generator, "fake_score": optim.fake_score}
    for name, (module, model) in modules.items():
        role = Role(name, module, model, recomputes=recomputes)
        if name in trained:
            role.add_optimizer(sections[name])
            role.ema = Ema(role.parameters) if name == "generator" else None
        roles[name] = role
    return Roles(roles, optim, num_steps)
