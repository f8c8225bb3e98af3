"""Counts the bytes that autograd keeps and that operations hold, on real or fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Storages = dict[int, torch.UntypedStorage]


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested containers."""
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def storages(tree: Any) -> Storages:
    """The distinct storages of the tensors in nested containers."""
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors_in(tree)}


def num_bytes(found: Storages) -> int:
    return sum(storage.nbytes() for storage in found.values())


def kept_storages(run: Callable[[], Any]) -> tuple[Storages, Any]:
    """What autograd keeps of `run` for its backward pass, parameters and inputs too; and what `run` returned."""
    kept: Storages = {}

    def keep(t: Tensor) -> Tensor:
        kept.update(storages(t))
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        result = run()
    return kept, result


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make inside the context, now and at most.

    accumulating: parameters whose gradients are left out from when they are accumulated.
    """

    def __init__(self, accumulating: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        self._hooks = [p.register_post_accumulate_grad_hook(self._leave_out) for p in accumulating if p.requires_grad]

    def __exit__(self, *args: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        for place, storage in storages(result).items():
            if place not in self._known and place not in inputs:
                self._known.add(place)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, place, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _leave_out(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        self._free(storage._cdata, storage.nbytes())

    def _free(self, place: int, size: int) -> None:
        if place in self._known:
            self._known.discard(place)
            self.now -= size
