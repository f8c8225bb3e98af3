"""Low-rank adapters on a frozen base, through peft: y = W x + scale B A x.

Several adapters hang on one base, so that roles share one copy of its weights. peft's own `set_adapter` is not used: it
also changes which weights take gradients, which Roles alone decides.

An adapter's tensors go by diffusers' names, `blocks.0.attn1.to_q.lora_A.weight`, whatever the adapter's name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sgmd_dist import registry, rng
from sgmd_dist.errors import UserError
from sgmd_dist.recipe import LoraSection

Forward = Callable[..., Any]

_NAME = re.compile(r"(?P<layer>.+)\.(?P<matrix>lora_[AB])\.(?P<adapter>\w+)\.weight")


@dataclass(frozen=True)
class Lora:
    """What an adapter is: A `[rank, in]` and B `[out, rank]` on every linear layer whose name ends with a target."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """The factor on B A x."""
        return self.alpha / self.rank


def lora_from(section: LoraSection, targets: Sequence[str], key: str) -> Lora:
    """The adapter that a recipe's section describes.

    Args:
        targets: the layers that the model family can adapt, which are also the default.
        key: the section's key in the recipe, for messages.

    Raises:
        UserError: a target is none of `targets`.
    """
    for target in section.targets or ():
        if target not in targets:
            raise UserError(f"{key}.targets: {target!r} is no layer of a block; {registry.allowed(target, [*targets])}")
    alpha = section.rank if section.alpha is None else section.alpha
    return Lora(section.rank, alpha, tuple(section.targets or targets))


def inject(module: nn.Module, name: str, lora: Lora, dtype: torch.dtype = torch.float32) -> None:
    """Hang the adapter `name` on the network's targets and freeze everything; no adapter is active then.

    The adapter's tensors have `dtype` and lie on the meta device until they are given storage and values.
    """
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] (peft divides it by the rank)
        target_modules=[*lora.targets],
        init_lora_weights=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # several adapters are meant
        inject_adapter_in_model(config, module, adapter_name=name, low_cpu_mem_usage=True)
    for layer in _layers(module):
        layer._active_adapter = []
    for parameter in adapter_parameters(module, name).values():
        parameter.data = parameter.data.to(dtype)
    module.requires_grad_(False)


def adapter_parameters(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The tensors of the adapter `name`, without that name in theirs; empty where there is no such adapter."""
    found = ((_NAME.fullmatch(full), parameter) for full, parameter in module.named_parameters())
    return {f"{m['layer']}.{m['matrix']}.weight": p for m, p in found if m is not None and m["adapter"] == name}


def base_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The network's tensors without adapters, by the names that they had before `inject`."""
    named = module.named_parameters()
    return {name.replace(".base_layer.", "."): p for name, p in named if not _NAME.fullmatch(name)}


def initial_value(adapter: str, name: str, shape: Sequence[int], seed: int) -> Tensor:
    """A tensor of a new adapter: float32 on the CPU, a function of (adapter, name, seed).

    B is zero, so that training starts at the base. A is normal with the variance of peft's default, 1 / (3 in).
    """
    if ".lora_B." in name:
        return torch.zeros(*shape)
    return rng.normal(shape, seed, f"init/{adapter}/{name}") / (3 * shape[1]) ** 0.5


def merged(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The base's tensors with W + scale B A for every adapted W, in W's dtype; the sum is made in float32."""
    weights = dict(base)
    for name, a in adapter.items():
        if ".lora_A." in name:
            layer = name.removesuffix(".lora_A.weight")
            b, weight = adapter[f"{layer}.lora_B.weight"].float(), base[f"{layer}.weight"]
            weights[f"{layer}.weight"] = (weight.float() + scale * (b @ a.float())).to(weight.dtype)
    return weights


class Switch:
    """Says which of a network's adapters its layers add. It leaves alone which weights take gradients."""

    def __init__(self, module: nn.Module) -> None:
        self._layers = list(_layers(module))
        self.adapters = frozenset(name for layer in self._layers for name in layer.lora_A)

    @property
    def active(self) -> str | None:
        """The active adapter; None is the base alone."""
        active = self._layers[0]._active_adapter if self._layers else []
        return active[0] if active else None

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Run with the adapter `name`, or None, then with what was active before.

        A backward pass may run outside, unless it recomputes: see `pin`.
        """
        before = self.active
        self.activate(name)
        try:
            yield
        finally:
            self.activate(before)

    def activate(self, name: str | None) -> None:
        """Add the adapter `name` from now on; None adds none."""
        for layer in self._layers:
            layer._active_adapter = [] if name is None else [name]


def pin(block: nn.Module) -> Callable[[Forward], Forward]:
    """A function that ties a forward of `block` to the adapter that is active when the function is called.

    A checkpointed block runs again in the backward pass, when another adapter or none is active.
    """
    switch = Switch(block)
    if not switch.adapters:
        return lambda forward: forward

    def pinned(forward: Forward) -> Forward:
        name = switch.active

        def run(*args: Any, **kwargs: Any) -> Any:
            if switch.active == name:  # the first run, and the only one that torch.compile sees
                return forward(*args, **kwargs)
            with switch.using(name):
                return forward(*args, **kwargs)

        return run

    return pinned


def _layers(module: nn.Module) -> Iterator[LoraLayer]:
    return (layer for layer in module.modules() if isinstance(layer, LoraLayer))
