"""Ring attention: queries stay, chunks of keys and values travel from rank to rank, results are merged by their LSE.

At step i rank r holds the chunk of rank r - i. While it computes on that chunk, it sends it on to r + 1 and receives
the next one from r - 1 into a second buffer. In the backward pass each chunk's gradient travels behind its chunk: rank
r adds its part and sends the sum on, and after as many hops as there are ranks the sum is home. Results and gradients
are summed in float32 (float64 for float64).

Shapes: B batch, S tokens of a chunk (padding included), h heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup

from sgmd_dist.parallel.mesh import process_group_of
from sgmd_kernels.attention import attention_backward, attention_forward

_CHUNK_TAG, _GRADIENT_TAG = 1, 2


def ring_attention(q: Tensor, kv: Tensor, lengths: Sequence[int], group: str, backend: str) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks of `group`; differentiable in q and kv.

    Args:
        q: `[B, S, h, D]`.
        kv: `[2, B, S, h, D]`, this rank's keys and values; padding only at the end.
        lengths: real tokens of each rank's chunk, the same list on all ranks; 0 for a chunk of padding.
        group: name of the ring's process group.
        backend: of `sgmd_kernels.attention`.

    Returns:
        `[B, S, h, D]` in q's dtype; rows of padding hold numbers that mean nothing.
    """
    needs_backward = torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad)
    return _ring(q, kv, list(lengths), group, backend, needs_backward)[0]


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: out `[B, S, h, D]` in place, lse `[B, h, S]`."""
    share = torch.sigmoid(part_lse - lse).transpose(1, 2).unsqueeze(-1)
    return out.lerp_(part.to(out.dtype), share), torch.logaddexp(lse, part_lse)


@torch.library.custom_op("sgmd_dist::ring_attention", mutates_args=())
def _ring(
    q: Tensor, kv: Tensor, lengths: Sequence[int], group: str, backend: str, needs_backward: bool
) -> tuple[Tensor, Tensor]:
    ring = _Ring(group)
    out = lse = None
    for chunk, length in ring.chunks(kv.contiguous(), lengths):
        if length == 0:
            continue
        k, v = chunk[:, :, :length]
        part = attention_forward(q, k, v, backend=backend, needs_backward=needs_backward)
        if out is None or lse is None:
            out, lse = part[0].to(torch.promote_types(q.dtype, torch.float32), copy=True), part[1]
        else:
            out, lse = merge(out, lse, *part)
    assert out is not None and lse is not None, "a sequence has at least one token"
    return out.to(q.dtype), lse


@torch.library.custom_op("sgmd_dist::ring_attention_backward", mutates_args=())
def _ring_backward(
    grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, lengths: Sequence[int], group: str, backend: str
) -> tuple[Tensor, Tensor]:
    ring, grad = _Ring(group), grad.contiguous()
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    home = torch.zeros(kv.shape, dtype=wide, device=q.device)
    away = torch.empty_like(home)
    hop: _Hop | None = None
    for chunk, length in ring.chunks(kv.contiguous(), lengths):
        parts = None
        if length:
            k, v = chunk[:, :, :length]
            parts = attention_backward(grad, q, k, v, out, lse, backend=backend)
        if hop is not None:
            hop.wait()
            home, away = away, home
        if parts is not None:
            dq += parts[0]
            home[0, :, :length] += parts[1]
            home[1, :, :length] += parts[2]
        hop = ring.start(home, away, _GRADIENT_TAG)
    assert hop is not None
    hop.wait()
    return dq.to(q.dtype), away.to(kv.dtype)


class _Hop:
    """A chunk on its way to the next rank, and one on its way here."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


class _Ring:
    """This rank's place in a ring of ranks."""

    def __init__(self, name: str) -> None:
        self._group: ProcessGroup = process_group_of(name)
        self._rank, self._size = self._group.rank(), self._group.size()

    def start(self, sent: Tensor, received: Tensor, tag: int) -> _Hop:
        """Begin to send to the next rank and to receive from the one before; neither tensor may be touched."""
        following, before = (self._rank + 1) % self._size, (self._rank - 1) % self._size
        send = dist.P2POp(dist.isend, sent, group=self._group, tag=tag, group_peer=following)
        receive = dist.P2POp(dist.irecv, received, group=self._group, tag=tag, group_peer=before)
        return _Hop(dist.batch_isend_irecv([send, receive]))

    def chunks(self, own: Tensor, lengths: Sequence[int]) -> Iterator[tuple[Tensor, int]]:
        """Each rank's chunk with its length, from the own one backwards; the next is under way meanwhile.

        Two buffers take turns: what is received at step i goes on at step i + 1 and may be overwritten at i + 2.
        """
        buffers = [torch.empty_like(own) for _ in range(min(self._size - 1, 2))]
        chunk = own
        for step in range(self._size):
            is_last = step == self._size - 1
            following = chunk if is_last else buffers[step % 2]
            hop = None if is_last else self.start(chunk, following, _CHUNK_TAG)
            yield chunk, lengths[(self._rank - step) % self._size]
            if hop is not None:
                hop.wait()
            chunk = following


@_ring.register_fake
def _(q: Tensor, kv: Tensor, lengths: Sequence[int], group: str, backend: str, needs_backward: bool):
    batch, length, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=wide)


@_ring_backward.register_fake
def _(grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, lengths: Sequence[int], group: str, backend: str):
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


def _save(ctx, inputs, output) -> None:
    q, kv, ctx.lengths, ctx.group, ctx.backend, _ = inputs
    ctx.save_for_backward(q, kv, *output)


def _differentiate(ctx, grad: Tensor, _: Tensor):
    gradients = _ring_backward(grad, *ctx.saved_tensors, ctx.lengths, ctx.group, ctx.backend)
    return *gradients, None, None, None, None


_ring.register_autograd(_differentiate, setup_context=_save)
