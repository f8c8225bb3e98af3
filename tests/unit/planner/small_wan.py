"""A Wan block in small, and what it keeps and holds: measured, to be held against the planner's formulas."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sgmd_dist.models.base import Gradient, PassShape
from sgmd_dist.models.wan import Section, Wan, build
from sgmd_dist.parallel.sequence import SequenceAxis

LATENTS, TEXT_TOKENS = (4, 9, 16, 20), 7  # 720 tokens: weights' gradients are small beside activations


@dataclass(frozen=True)
class Block:
    """A network's first block with inputs as its network hands them over."""

    model: Wan
    module: nn.Module
    arguments: tuple[Any, ...]

    @property
    def shared(self) -> list[Tensor]:
        """What all blocks read: text, modulations, angles."""
        _, text, modulations, (cos, sin, _) = self.arguments
        return [text, modulations, cos, sin]

    def run(self) -> Tensor:
        return self.module(*self.arguments)


def small_wan(
    dtype: str, *, per_token: bool = False, ffn_dim: int = 112, cross_attn_norm: bool = True, **changes: int
) -> Wan:
    config = {
        "num_attention_heads": 3, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 24,
        "freq_dim": 16, "ffn_dim": ffn_dim, "num_layers": 2, "rope_max_seq_len": 32, "cross_attn_norm": cross_attn_norm,
        **changes,
    }  # fmt: skip
    section = Section.model_validate({"compute_dtype": dtype, "config": config, "expand_timesteps": per_token})
    return build(section, None, "model.pretrained")


def network(model: Wan) -> nn.Module:
    module = nn.Module.to(model.build(), model.compute_dtype)
    model.reset_buffers(module, torch.device("cpu"))
    model.attach(module, SequenceAxis(None))
    return module


def pass_shape(batch: int = 2, *, fused_norms: bool = False) -> PassShape:
    return PassShape(batch, LATENTS, TEXT_TOKENS, fused_norms=fused_norms)


def block_of(model: Wan, gradient: Gradient, batch: int = 2, context: int = TEXT_TOKENS) -> Block:
    torch.manual_seed(0)
    module = network(model).requires_grad_(gradient == "weights")
    width = model.config["num_attention_heads"] * model.config["attention_head_dim"]
    length, trained = model.num_tokens(LATENTS), gradient == "weights"

    def random(*shape: int, requires_grad: bool) -> Tensor:
        return torch.randn(*shape, dtype=model.compute_dtype, requires_grad=requires_grad)

    rows = (batch, length) if model.expand_timesteps else (batch,)
    arguments = (
        random(batch, length, width, requires_grad=gradient != "none"),
        random(batch, context, width, requires_grad=trained),
        random(*rows, 6, width, requires_grad=trained),
        module.rope(torch.zeros(batch, *LATENTS)),
    )
    return Block(model, module.blocks[0], arguments)


def saved_bytes(block: Block) -> int:
    """Bytes of the storages that autograd keeps of a block, without parameters, its input and what blocks share."""
    return kept_bytes(block.run, [*block.module.parameters(), *block.shared, block.arguments[0]])


def kept_bytes(run: Callable[[], Tensor], apart: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps of `run`, without those of the tensors `apart`."""
    passed_over = {t.untyped_storage().data_ptr() for t in apart}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        place = t.untyped_storage().data_ptr()
        if place not in passed_over:
            kept[place] = t
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        run()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make inside the context, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {_place(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_iter(result):
            if isinstance(t, Tensor) and (place := _place(t)) not in self._known | inputs:
                self._known.add(place)
                size = t.untyped_storage().nbytes()
                self.now += size
                weakref.finalize(t.untyped_storage(), self._free, place, size)
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def _place(t: Tensor) -> int:
    return t.untyped_storage()._cdata
