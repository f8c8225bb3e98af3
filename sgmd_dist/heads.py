"""Heads on a network's blocks: a logit per sample, made of the tokens that some blocks give out.

A head lies inside the network that it reads, as its child `head`: it is sharded, trained, saved and resumed with the
layers outside of blocks, and frozen when they are. It runs only when it is asked, at the end of the network's forward
pass and inside of it: its logits are a part of the network's output, so that FSDP gathers the network again for a
backward pass that begins at them alone.

Shapes: B batch, c tokens of this rank's run, L tokens of the sequence, D width of a token, W width of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from sgmd_dist import rng
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import LatentShape, PassShape, SequenceAxis, VideoModel
from sgmd_dist.recipe import HeadSection

NAME = "head"
_DEPTHS = (2, 3, 4)  # quarters of the blocks, at whose ends a head reads unless told otherwise


@dataclass
class Question:
    """What a head is asked during one forward pass, and its answers.

    Attributes:
        latent_shape: of the network's input.
        detached: whether the tokens are read without their graph.
        tokens: what the blocks gave so far, by their place among those that the head reads.
        logits: the answer `[B]`, float32 or wider; of a model with experts the one that ran answers.
    """

    latent_shape: LatentShape
    detached: bool
    tokens: dict[int, Tensor] = field(default_factory=dict)
    logits: list[Tensor] = field(default_factory=list)


class Head(nn.Module):
    """Each block's tokens are normed, projected and put through SiLU, token by token; then averaged over the sequence.
    A small network makes a logit of the averages, in float32.

    Attributes:
        lr_ratio: the learning rate of its weights over that of the network's.
        num_tokens: L of latents of a shape.
        mean: over the tokens of the whole sequence; see `SequenceAxis.mean`.
    """

    def __init__(self, num_inputs: int, model: VideoModel, section: HeadSection) -> None:
        super().__init__()
        shape, width = model.attention_shape(), section.width
        token_width = shape.num_heads * shape.head_size
        self.norms = nn.ModuleList(nn.LayerNorm(token_width) for _ in range(num_inputs))
        self.projections = nn.ModuleList(nn.Linear(token_width, width) for _ in range(num_inputs))
        self.mix = nn.Linear(num_inputs * width, width)
        self.logit = nn.Linear(width, 1)
        self.lr_ratio = section.lr_ratio
        self.num_tokens = model.num_tokens
        self.mean: Callable[[Tensor, int, int], Tensor] = _mean
        self.question: Question | None = None

    def forward(self, tokens: Sequence[Tensor], length: int) -> Tensor:
        """Logits `[B]`.

        Args:
            tokens: `[B, c, D]` of each block that the head reads.
            length: L, of which the ranks of a sequence have a run each.
        """
        pooled = [
            self.mean(silu(_wide(projection(norm(x.to(self.mix.weight.dtype))))), 1, length)
            for x, norm, projection in zip(tokens, self.norms, self.projections, strict=True)
        ]
        hidden = silu(linear(torch.cat(pooled, 1), _wide(self.mix.weight), _wide(self.mix.bias)))
        return linear(hidden, _wide(self.logit.weight), _wide(self.logit.bias)).flatten()

    @torch.compiler.disable
    def _keep(self, place: int, block: nn.Module, args: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        """Forward hook of a block; compiled blocks call it as it is."""
        if self.question is not None:
            tokens = output[0] if isinstance(output, tuple) else output
            self.question.tokens[place] = tokens.detach() if self.question.detached else tokens

    def _answer(self, network: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Forward hook of the network, whose output is a tuple with the velocity first."""
        question = self.question
        if question is None:
            return None
        tokens = [question.tokens.pop(place) for place in range(len(self.norms))]
        question.logits.append(self(tokens, self.num_tokens(question.latent_shape)))
        return (*output, question.logits[-1])


def read_blocks(section: HeadSection, num_blocks: int) -> tuple[int, ...]:
    """The numbers of the blocks, from 0, whose output a head reads.

    Raises:
        UserError: the network has no such block.
    """
    if section.blocks is None:
        return tuple(sorted({-(-num_blocks * quarter // 4) - 1 for quarter in _DEPTHS}))
    for number in section.blocks:
        if number >= num_blocks:
            raise UserError(
                f"{section.key}.blocks: {number}: expected numbers from 0 to {num_blocks - 1}: the network has"
                f" {num_blocks} blocks"
            )
    return tuple(section.blocks)


def inject(module: nn.Module, model: VideoModel, section: HeadSection) -> None:
    """Give each network in `module` a head, on the current default device.

    Called before the network is checkpointed, compiled and sharded.
    """
    numbers = read_blocks(section, model.attention_shape().num_blocks)
    for network in model.networks(module):
        head = Head(len(numbers), model, section)
        blocks = model.blocks(network)
        for place, number in enumerate(numbers):
            blocks[number].register_forward_hook(partial(head._keep, place))
        network.register_forward_hook(head._answer)
        network.add_module(NAME, head)


def attach(module: nn.Module, axis: SequenceAxis) -> None:
    """Make the heads average over all ranks' tokens."""
    for head in heads_of(module):
        head.mean = axis.mean


def heads_of(module: nn.Module) -> list[Head]:
    """The heads of the networks in `module`."""
    return [part for part in module.modules() if isinstance(part, Head)]


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The heads' tensors, by their names in `module`."""
    found = ((name, part) for name, part in module.named_modules() if isinstance(part, Head))
    return {f"{prefix}.{name}": p for prefix, head in found for name, p in head.named_parameters()}


def initial_value(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """A tensor of a new head: float32 on the CPU, a function of (name, seed).

    Matrices are normal of variance 1 / in: a last layer of zeros would hide the blocks from the first gradients.
    """
    if len(shape) == 1:
        return torch.ones(*shape) if ".norms." in name and name.endswith("weight") else torch.zeros(*shape)
    return rng.normal(shape, seed, f"init/{name}") / shape[1] ** 0.5


def saved_bytes(section: HeadSection, model: VideoModel, shape: PassShape) -> tuple[int, int]:
    """What autograd keeps of a head's tokens until its backward pass, on a rank, for the gradient of (the network's
    input, its weights): the blocks' outputs with their statistics, what SiLU is put on, and for the weights what is
    projected. What belongs to samples and not to tokens is too small to count."""
    attention, dtype = model.attention_shape(), model.compute_dtype
    run = -(-model.num_tokens(shape.latent_shape) // (shape.ring * shape.ulysses))
    tokens = shape.batch * run * len(read_blocks(section, attention.num_blocks))
    copy = dtype.itemsize * attention.num_heads * attention.head_size
    for_input = tokens * (copy + 8 + 4 * section.width)
    return for_input, for_input + tokens * copy


@contextmanager
def asked(heads: Sequence[Head], latent_shape: LatentShape, *, detached: bool = False) -> Iterator[list[Tensor]]:
    """Ask the heads in the forward passes within; yields the list that takes their logits `[B]`.

    Args:
        latent_shape: of the networks' input.
        detached: read the tokens without their graph: a backward pass ends in the head.
    """
    question = Question(latent_shape, detached)
    for head in heads:
        head.question = question
    try:
        yield question.logits
    finally:
        for head in heads:
            head.question = None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean(x: Tensor, dim: int, length: int) -> Tensor:
    """Of a sequence that one rank has whole."""
    return x.mean(dim)
