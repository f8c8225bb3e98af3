"""What a rank does under fake tensors: the collectives that it issues and the bytes that live on its device.

Bytes are those of tensors' storages, by what they are for. What a kernel allocates inside itself and what an allocator
rounds up or keeps is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.distributed.distributed_c10d import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sgmd_dist.parallel.mesh import process_group_of
from sgmd_dist.shard import local

Category = Literal["parameters", "gradients", "optimizer", "ema", "gathered", "activations", "host"]
CATEGORIES: tuple[Category, ...] = get_args(Category)[:-1]  # on the device

_GROUP_ARGUMENTS = ("process_group", "group_name", "group")
_DEVICE_OF = torch.ops.prim.device.default
_SCALAR_OF = torch.ops.aten._local_scalar_dense.default
_UNKNOWN_SIZES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_WRITES = frozenset(f"aten::{name}_" for name in ("add", "sub", "mul", "div", "copy", "fill", "zero", "lerp", "clamp"))
# What these hand out or fill besides an operation's default, activations.
_MADE_BY: dict[str, Category] = {
    "fsdp::all_gather_copy_in": "gathered",
    "fsdp::split_with_sizes_copy": "gathered",
    "c10d::_allgather_base_": "gathered",
    "fsdp::chunk_cat": "gradients",
    "c10d::_reduce_scatter_base_": "gradients",
}


class Group(NamedTuple):
    """A process group as every member sees it: its size, and the distance between neighbours' ranks."""

    size: int
    stride: int

    def __str__(self) -> str:
        return f"{self.size} ranks" + (f", every {self.stride}th" if self.stride > 1 else "")


class Collective(NamedTuple):
    """One call. Ranks that issue unequal ones to the same group hang or mix up their data.

    `num_bytes` is the size of its largest tensor: what an all-gather gives, what a reduce-scatter takes.
    """

    kind: str
    group: Group
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_bytes: int

    def __str__(self) -> str:
        tensors = ", ".join(f"{dtype} {list(shape)}" for dtype, shape in zip(self.dtypes, self.shapes, strict=True))
        return f"{self.kind} over {self.group} of {tensors}"


@dataclass
class Part:
    """What one phase of one step did. `peak` is of the moment when the most bytes lived, by category."""

    name: str
    collectives: list[Collective] = field(default_factory=list)
    peak: dict[Category, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


class Tracer(TorchDispatchMode):
    """Records what runs under it, in parts: fake tensors, where it is entered inside a `FakeTensorMode`, or real ones.

    A number that is read from a fake tensor (`item`, `tolist`) is 1: it has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts = [Part("beginning")]
        self._live: dict[int, tuple[int, Category, weakref.ref]] = {}
        self._bytes: Counter[Category] = Counter()
        self._total = self._peak = 0
        self._known: dict[tuple[Any, ...], list[_Form]] = {}

    def __enter__(self) -> Tracer:
        self._untraced_resize = torch.UntypedStorage.resize_
        tracer, resize = self, self._untraced_resize

        def traced_resize(self: torch.UntypedStorage, size: int) -> Any:
            result = resize(self, size)
            tracer._resized(self)
            return result

        torch.UntypedStorage.resize_ = traced_resize  # FSDP frees and takes gathered parameters by it
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._untraced_resize
        super().__exit__(*error)

    def begin(self, name: str) -> None:
        """Start a new part."""
        self.parts.append(Part(name))
        self._peak = 0
        self._note_peak()

    def assign(self, category: Category, tensors: Iterable[Tensor]) -> None:
        """Count the storages of `tensors` under `category` from now on; those of `host` count for nothing."""
        for tensor in tensors:
            self._count(local(tensor).untyped_storage(), category, move=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF:  # the most frequent by far: answered here, it costs a fifth
            device = getattr(args[0], "fake_device", None)
            return func(*args) if device is None else device
        if DTensor in types:
            return NotImplemented  # its local operations come here by themselves
        if func is _SCALAR_OF and isinstance(args[0], FakeTensor):
            return 1
        traits = _traits(func)
        kwargs = kwargs or {}
        if traits.writes_to_first and isinstance(args[0], FakeTensor):
            return args[0]
        if traits.group_position is not None:
            self.parts[-1].collectives.append(_collective(traits, args, kwargs))
        if traits.is_view and isinstance(args[0], FakeTensor):
            result = _view(func, args, kwargs)
        elif traits.makes_new:
            result = self._made_again(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        if traits.category is not None:
            for tensor in _tensors((result, kwargs.get("out"))):
                self._count(tensor.untyped_storage(), traits.category, move=True)
        elif not traits.is_view:
            for tensor in (result,) if isinstance(result, Tensor) else _tensors(result):
                self._count(tensor.untyped_storage(), "activations", move=False)
        return result

    def _made_again(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What `FakeTensorMode` makes, remembered by the inputs' sizes: blocks and micro-batches repeat each other."""
        key = _key(func, args, kwargs)
        known = self._known.get(key) if key is not None else None
        if known is None:
            result = func(*args, **kwargs)
            if key is not None and (forms := _forms(result)) is not None:
                self._known[key] = forms
            return result
        return _made(known[0]) if len(known) == 1 else tuple(_made(form) for form in known)

    def _count(self, storage: torch.UntypedStorage, category: Category, *, move: bool) -> None:
        key = storage._cdata
        known = self._live.get(key)
        if known is None:
            size, reference = storage.nbytes(), weakref.ref(storage, lambda _, key=key: self._forget(key))
        elif move and known[1] != category:
            size, before, reference = known
            self._add(before, -size)
        else:
            return
        self._live[key] = (size, category, reference)
        self._add(category, size)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        known = self._live.get(storage._cdata)
        if known is not None:
            size, category, reference = known
            self._live[storage._cdata] = (storage.nbytes(), category, reference)
            self._add(category, storage.nbytes() - size)

    def _forget(self, key: int) -> None:
        size, category, _ = self._live.pop(key)
        self._add(category, -size)

    def _add(self, category: Category, size: int) -> None:
        self._bytes[category] += size
        if category != "host":
            self._total += size
        if self._total > self._peak:
            self._note_peak()

    def _note_peak(self) -> None:
        self._peak = self._total
        self.parts[-1].peak = {category: self._bytes[category] for category in CATEGORIES}


def _view(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What `FakeTensorMode` makes of a view, in a quarter of its time: a third of all operations are views."""
    fake = args[0]
    with in_kernel_invocation_manager(fake.fake_mode):
        result = func(*args, **kwargs)
    if isinstance(result, Tensor):
        return FakeTensor(fake.fake_mode, result, fake.fake_device)
    return type(result)(FakeTensor(fake.fake_mode, part, fake.fake_device) for part in result)


class _Form(NamedTuple):
    """All that a fake tensor of its own storage is."""

    mode: Any
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _made(form: _Form) -> FakeTensor:
    with in_kernel_invocation_manager(form.mode):
        meta = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")
    return FakeTensor(form.mode, meta, form.device)


def _forms(result: Any) -> list[_Form] | None:
    """The forms of an operation's results; None where one is no dense fake tensor of its own storage."""
    forms = []
    for tensor in result if isinstance(result, (tuple, list)) else (result,):
        if not isinstance(tensor, FakeTensor) or tensor.storage_offset():
            return None
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.itemsize:
            return None
        forms.append(_Form(tensor.fake_mode, tensor.fake_device, tensor.shape, tensor.stride(), tensor.dtype))
    return forms


def _key(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What the forms of an operation's results follow from; None where that is not known to be all."""
    parts: list[Any] = [func]
    for value in (*args, *kwargs, *kwargs.values()):
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, FakeTensor):
                parts.append((item.dtype, item.shape, item.stride(), item.fake_device))
            elif isinstance(item, _PLAIN):
                parts.append((type(item), item))
            else:
                return None
        parts.append(len(value) if isinstance(value, (tuple, list)) else None)
    return tuple(parts)


_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class _Traits(NamedTuple):
    """What matters of an operation: where its process group stands, what it makes, whether it makes anything.

    makes_new: its results are new tensors, whose sizes follow from those of its inputs. writes_to_first: it only writes
    values, to its first argument, and returns it.
    """

    name: str
    group_position: int | None
    category: Category | None
    is_view: bool
    makes_new: bool
    writes_to_first: bool


@cache
def _traits(func: Any) -> _Traits:
    name, arguments = func._schema.name, [argument.name for argument in func._schema.arguments]
    found = [arguments.index(key) for key in _GROUP_ARGUMENTS if key in arguments]
    category = _MADE_BY.get(name)
    is_known = not found and category is None and not func.is_view and not _UNKNOWN_SIZES & {*func.tags}
    return _Traits(
        name,
        found[0] if found else None,
        category,
        func.is_view,
        makes_new=is_known and not func._schema.is_mutable and _makes_tensors(func),
        writes_to_first=is_known and name in _WRITES,
    )


def _makes_tensors(func: Any) -> bool:
    """Whether all that it returns are tensors that no argument shares."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is None and r.type.kind() == "TensorType" for r in returns)


def _collective(traits: _Traits, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Collective:
    assert traits.group_position is not None
    given = args[traits.group_position] if traits.group_position < len(args) else None
    if given is None:
        given = next(kwargs[key] for key in _GROUP_ARGUMENTS if key in kwargs)
    tensors = list(_tensors((args, kwargs)))
    return Collective(
        traits.name.removeprefix("c10d::").removeprefix("_c10d_functional::"),
        _group(given),
        tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors),
        tuple(tuple(tensor.shape) for tensor in tensors),
        max((tensor.numel() * tensor.itemsize for tensor in tensors), default=0),
    )


def _group(given: Any) -> Group:
    if isinstance(given, str):
        group = process_group_of(given)
    else:
        group = given if isinstance(given, ProcessGroup) else ProcessGroup.unbox(given)
    ranks = dist.get_process_group_ranks(group)
    return Group(len(ranks), ranks[1] - ranks[0] if len(ranks) > 1 else 1)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested sequences and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
