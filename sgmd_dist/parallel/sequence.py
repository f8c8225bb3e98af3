"""Sequence parallelism for video transformers: each rank of a group holds a run of the tokens of the same samples.

A model family attaches a `SequenceAxis` to its network: tokens are split after patch embedding, blocks see local
tokens, self-attention exchanges what it must (`ulysses`, `ring`, or both: heads are shared out over the ulysses ranks
and key chunks travel round the ring ranks), cross-attention reads the whole text, and the last projection's output is
gathered. Any sequence length and any number of heads will do: the last ranks' runs are filled up with zeros, which
are cut off again before every kernel.

Gradients: a rank's backward pass computes the gradient of the sum of all ranks' losses. `gather` adds up what the
ranks send back; everything else follows. So averaging over all ranks, as FSDP does over the flattened mesh, gives the
gradient of the mean over data-parallel groups, for every parameter and for losses that mix tokens. A network's input
gradient on one rank is the part through its own tokens, times the size of the group: the mean over the group is the
whole.

Communication per block and rank, with U ulysses ranks, R ring ranks, P = U R, a run of c = ceil(L / P) tokens, H heads
padded to H' = U ceil(H / U), head size D and batch B; N = B c H' D numbers:

    forward     U > 1: 2 all-to-alls (q, k, v together; the output), 4 N (U - 1) / U numbers sent
                R > 1: R - 1 hops of k and v, 2 N (R - 1) numbers
    backward    U > 1: 2 all-to-alls, 4 N (U - 1) / U numbers
                R > 1: R - 1 hops of k and v, 2 N (R - 1) numbers, and R hops of their gradients, 2 N R in float32

Recomputing a block (activation checkpointing) repeats the forward's. Once per pass the output's tokens are gathered;
its backward is one reduce-scatter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from sgmd_dist.parallel.mesh import SequenceGroup, process_group_of
from sgmd_dist.parallel.ring import ring_attention
from sgmd_dist.parallel.ulysses import to_heads, to_tokens
from sgmd_kernels.attention import AUTO, attention

# torch 2.13's names, and those before
_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class Partition:
    """How `length` tokens lie on ring x ulysses ranks: equal runs, the last ones filled up."""

    length: int
    ring: int
    ulysses: int

    @property
    def size(self) -> int:
        return self.ring * self.ulysses

    @property
    def run(self) -> int:
        """Tokens per rank, padding included."""
        return -(-self.length // self.size)

    @property
    def padding(self) -> int:
        """Tokens that only fill up, over all ranks."""
        return self.run * self.size - self.length

    def chunk_lengths(self) -> list[int]:
        """Real tokens of each ring rank's chunk: the runs of its ulysses ranks, one after the other."""
        chunk = self.run * self.ulysses
        return [min(max(self.length - r * chunk, 0), chunk) for r in range(self.ring)]


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in one block: calls and bytes, by the formulas above."""

    all_to_alls: int
    hops: int
    all_to_all_bytes: int
    hop_bytes: int

    @property
    def sent_bytes(self) -> int:
        return self.all_to_all_bytes + self.hop_bytes


def traffic(
    partition: Partition, *, batch: int, heads: int, head_size: int, item_bytes: int
) -> tuple[Traffic, Traffic]:
    """Traffic of one block's (forward, backward), for tensors of `item_bytes` per number."""
    ulysses, ring = partition.ulysses, partition.ring
    numbers = batch * partition.run * -(-heads // ulysses) * ulysses * head_size
    all_to_alls = 2 * (ulysses > 1)
    exchanged = 4 * numbers * (ulysses - 1) // ulysses * item_bytes
    hops = ring - 1
    keys = 2 * numbers * hops * item_bytes
    gradient_hops = ring * (ring > 1)
    gradients = 2 * numbers * gradient_hops * 4
    return (
        Traffic(all_to_alls, hops, exchanged, keys),
        Traffic(all_to_alls, hops + gradient_hops, exchanged, keys + gradients),
    )


class SequenceAxis:
    """What a network needs of the group that shares its sequence; see `sgmd_dist.models.base.SequenceAxis`.

    Without a group there is one rank: nothing is split, and attention is a kernel.
    """

    def __init__(self, group: SequenceGroup | None, backend: str = AUTO) -> None:
        self._group = group
        self._backend = backend
        self.size = 1 if group is None else group.ring * group.ulysses

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's run of x's tokens along `dim`, filled up with zeros to the length of all runs."""
        if self._group is None:
            return x
        length = x.shape[dim]
        run = -(-length // self.size)
        start = min(self._group.rank * run, length)
        return _fill_up(x.narrow(dim, start, min(run, length - start)), dim, run)

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """All ranks' runs along `dim`, cut to `length` tokens. Its backward adds up the ranks' gradients."""
        if self._group is None:
            return x
        runs = _all_gather(x.contiguous(), self._group.whole)
        return runs.movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, length)

    def mean(self, x: Tensor, dim: int, length: int) -> Tensor:
        """The mean over all ranks' `length` tokens along `dim`, equal on all ranks. Each sends one sum."""
        if self._group is None:
            return x.mean(dim)
        run = x.shape[dim]
        start = min(self._group.rank * run, length)
        own = x.narrow(dim, 0, min(run, length - start)).sum(dim, keepdim=True)
        return self.gather(own, dim, self.size).sum(dim) / length

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        """Attention of all tokens over all tokens.

        Args:
            q, k, v: `[B, c, H, D]`, this rank's run.
            length: the number of real tokens L of the whole sequence.

        Returns:
            This rank's run of the output, `[B, c, H, D]`.
        """
        group = self._group
        if group is None:
            return attention(q, k, v, backend=self._backend)
        heads = q.shape[2]
        if group.ulysses > 1:
            q, k, v = to_heads(torch.stack([q, k, v]), group.ulysses, group.ulysses_name).unbind(0)
        if group.ring > 1:
            lengths = Partition(length, group.ring, group.ulysses).chunk_lengths()
            out = ring_attention(q, torch.stack([k, v]), lengths, group.ring_name, self._backend)
        else:
            out = attention(*(x.narrow(1, 0, length) for x in (q, k, v)), backend=self._backend)
            out = _fill_up(out, 1, q.shape[1])
        return out if group.ulysses == 1 else to_tokens(out, heads, group.ulysses, group.ulysses_name)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of this rank's queries over keys that every rank has whole: no communication."""
        return attention(q, k, v, backend=self._backend)


def agree(valid: Tensor, unit: int, group: SequenceGroup | None) -> Tensor:
    """`[B]` bool: True where it is on every rank of the group, which must all weigh a sample alike.

    Args:
        valid: `[B]` bool, in host memory: the devices are not waited for.
        unit: the number of the unit that this rank holds.

    Raises:
        RuntimeError: the ranks hold different units.
    """
    if group is None:
        return valid
    facts = compare(valid, unit, group)
    lowest, highest = int(facts[0]), -int(facts[1])
    if lowest != highest:
        raise RuntimeError(f"ranks of one sequence hold units {lowest} to {highest} of the data: they must hold one")
    return facts[2:].bool()


def compare(valid: Tensor, unit: int, group: SequenceGroup) -> Tensor:
    """The collective of `agree`: `[2 + B]` integers, the smallest of unit, -unit and `valid` in the group."""
    facts = torch.cat([torch.tensor([unit, -unit]), valid.long()])
    dist.all_reduce(facts, op=dist.ReduceOp.MIN, group=process_group_of(group.whole))
    return facts


def _fill_up(x: Tensor, dim: int, length: int) -> Tensor:
    """x with zeros after its end along `dim`, up to `length`."""
    missing = length - x.shape[dim]
    return functional.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing]) if missing else x


@torch.library.custom_op("sgmd_dist::all_gather", mutates_args=())
def _all_gather(x: Tensor, group: str) -> Tensor:
    """`[*shape]` of each rank to `[size, *shape]`."""
    process_group = process_group_of(group)
    gathered = x.new_empty((process_group.size() * x.shape[0], *x.shape[1:]))
    _gather_single(gathered, x, group=process_group)
    return gathered.unflatten(0, (process_group.size(), -1))


@_all_gather.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty((process_group_of(group).size(), *x.shape))


@torch.library.custom_op("sgmd_dist::reduce_scatter", mutates_args=())
def _reduce_scatter(x: Tensor, group: str) -> Tensor:
    """`[size, *shape]` of each rank to the sum of what the ranks hold for this one, summed in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous().flatten(0, 1)
    scattered = wide.new_empty(x.shape[1:])
    _scatter_single(scattered, wide, group=process_group_of(group))
    return scattered.to(x.dtype)


@_reduce_scatter.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape[1:])


def _remember(ctx, inputs, output) -> None:
    _, ctx.group = inputs


def _scatter_back(ctx, grad: Tensor):
    return _reduce_scatter(grad, ctx.group), None


_all_gather.register_autograd(_scatter_back, setup_context=_remember)
