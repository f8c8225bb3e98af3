"""FLOPs and activation bytes of a pass on one rank, by running it on fake tensors: nothing is computed or held.

For families without formulas of their own. A network of two blocks is run, then the second of them alone; what is
multiplied, what autograd keeps and what is alive at the worst moment is counted as it comes: products of matrices and
kept bytes are exact on a CPU, whose tensors the fake ones are. There torch's RMSNorm is made of several operations and
keeps more than the one kernel of CUDA, and a layer's gradient of its weights counts until it is accumulated: for a GPU
bytes are an upper bound. Self-attention is counted by its formula, which knows of split sequences; the buffers of their
exchange are left out, as in other families' formulas.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sgmd_dist.models._live_bytes import LiveBytes, Storages, kept_storages, num_bytes, storages, tensors_in
from sgmd_dist.models.base import ActivationBytes, AttentionShape, Flops, Gradient, PassCosts, PassShape
from sgmd_kernels.attention import attention

_ATTENTION_BACKWARD = 2.5  # a flash-like kernel forms the scores again: 5 products of matrices for the forward's 2
_BLOCKS = 2  # all tokens of the second have a graph, also where only the latents need gradients
_MASKED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_MASKED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_BY_FORMULA = (torch.ops.sgmd_kernels.attention, torch.ops.sgmd_kernels.attention_backward)


class Traceable(Protocol):
    """What of a `VideoModel` is run here; `with_blocks` is the same architecture with another number of blocks."""

    config: dict[str, Any]
    compute_dtype: torch.dtype

    def with_blocks(self, count: int) -> Any: ...

    def attention_shape(self) -> AttentionShape: ...

    def text_dim(self) -> int: ...


_known: dict[str, PassCosts] = {}  # a plan asks for the same again, for each role


def traced_costs(model: Traceable, shape: PassShape) -> PassCosts:
    """Costs of one pass of the model's network."""
    key = repr((type(model), model.config, model.compute_dtype, shape))
    if key not in _known:
        _known[key] = _traced(model, shape)
    return _known[key]


def _traced(model: Traceable, shape: PassShape) -> PassCosts:
    count = model.attention_shape().num_blocks
    with _disable_current_modes(), FakeTensorMode():  # a dry run asks from within its own modes
        forward, of_input, of_weights = (_Run(model, shape, gradient) for gradient in ("none", "input", "weights"))
        attended = forward.attended()
        block = forward.block_flops(), of_input.block_flops(), of_weights.block_flops()
        whole = forward.network_flops(), of_input.network_flops(), of_weights.network_flops()
        kept = of_input.block_kept(), of_weights.block_kept()
        return PassCosts(
            num_blocks=count,
            linear=Flops(*(count * (total - part) for total, part in zip(block, attended.masked, strict=True))),
            self_attention=_attention(count * attended.within),
            cross_attention=_attention(count * attended.across),
            rest=Flops(*(network - _BLOCKS * flops for network, flops in zip(whole, block, strict=True))),
            activations=ActivationBytes(
                block_input=num_bytes(forward.inputs),
                input_saved=kept[1][0],
                attention=attended.kept,
                block_saved=(kept[0][1], kept[1][1]),
                block_forward=forward.forward_peak(),
                block_backward=(of_input.backward_peak() - kept[0][1], of_weights.backward_peak() - kept[1][1]),
                shared=num_bytes(forward.shared),
                modulations=0,
                rest_saved=(of_input.rest_kept(kept[0]), of_weights.rest_kept(kept[1])),
            ),
            output_numbers=forward.output_numbers,
        )


def _attention(forward: float) -> Flops:
    return Flops(forward, _ATTENTION_BACKWARD * forward, _ATTENTION_BACKWARD * forward)


class _Run:
    """A network of two blocks, its inputs, and those of its second block.

    Attributes:
        inputs: storages that the block before made.
        shared: storages that both blocks read.
    """

    def __init__(self, model: Traceable, shape: PassShape, gradient: Gradient) -> None:
        self._model = model.with_blocks(_BLOCKS)
        self._axis = _Axis(shape)
        self._module = _fake(self._model, model.compute_dtype)
        self._model.reset_buffers(self._module, torch.device("cpu"))
        self._module.requires_grad_(gradient == "weights")
        self._model.attach(self._module, self._axis)
        self._latents = torch.empty(shape.batch, *shape.latent_shape, requires_grad=gradient == "input")
        self._text = torch.empty(shape.batch, shape.text_tokens, model.text_dim())
        self._has_graph = gradient != "none"
        self._blocks = self._model.blocks(self._module)
        self._calls: list[tuple[Any, Any]] = []
        hooks = [block.register_forward_pre_hook(self._note, with_kwargs=True) for block in self._blocks]
        hooks.append(self._module.get_submodule("proj_out").register_forward_hook(self._note_output, prepend=True))
        self.output_numbers = 0
        self._network()
        for hook in hooks:
            hook.remove()
        first, second = map(storages, self._calls)
        self.shared: Storages = {place: s for place, s in second.items() if place in first}
        self.inputs: Storages = {place: s for place, s in second.items() if place not in first}

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._calls.append((args, kwargs))

    def _note_output(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.output_numbers = output.numel()

    def _network(self) -> Tensor:
        with torch.set_grad_enabled(self._has_graph):
            sigma = torch.empty(self._latents.shape[0])
            return self._model.velocity(self._module, self._latents, sigma, self._text)

    def _block(self) -> tuple[Any, partial[Any]]:
        """The second block's arguments as leaves of a graph, and the block with them."""
        args, kwargs = tree_map(_as_leaf, self._calls[1])
        return (args, kwargs), partial(self._blocks[1], *args, **kwargs)

    def attended(self) -> _Attended:
        """What the block's attention does."""
        self._axis.reset()
        with _Masked() as masked, torch.no_grad():
            self._block()[1]()
        return _Attended(self._axis.flops, self._axis.kept, masked)

    def block_flops(self) -> float:
        """Forward without a graph, else backward, without what is counted by formula."""
        return self._flops(self._block()[1])

    def network_flops(self) -> float:
        return self._flops(self._network)

    def _flops(self, run: Any) -> float:
        counter = FlopCounterMode(display=False, custom_mapping={_MASKED: _scores, _MASKED_BACKWARD: _scores_backward})
        if not self._has_graph:
            with counter, torch.no_grad():
                run()
        else:
            outputs = [t for t in tensors_in(run()) if t.requires_grad]
            with counter:
                torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
        counts = counter.get_flop_counts().get("Global", {})
        return float(sum(flops for operation, flops in counts.items() if operation not in _BY_FORMULA))

    def block_kept(self) -> tuple[int, int]:
        """Bytes that autograd keeps of the block: of its input, and besides."""
        arguments, run = self._block()
        kept, _ = kept_storages(run)
        own = {place: s for place, s in kept.items() if place not in self._apart(arguments)}
        return num_bytes({place: s for place, s in kept.items() if place in self.inputs}), num_bytes(own)

    def rest_kept(self, block: tuple[int, int]) -> int:
        """Bytes that autograd keeps of the network beside its blocks and what these share."""
        kept, _ = kept_storages(self._network)
        apart = self._apart((self._latents, self._text))
        whole = num_bytes({place: s for place, s in kept.items() if place not in apart})
        return max(whole - _BLOCKS * sum(block) - num_bytes(self.shared), 0)

    def _apart(self, arguments: Any) -> Storages:
        return storages((list(self._module.parameters()), arguments))

    def forward_peak(self) -> int:
        """The most that the block holds without a graph, beside its input."""
        _, run = self._block()
        with torch.no_grad(), LiveBytes() as live:
            run()
        return live.peak

    def backward_peak(self) -> int:
        """The most that is held while the block is recomputed and run backward; the gradient of its output stands for
        the output itself, of the same size."""
        _, run = self._block()
        with LiveBytes(self._module.parameters()) as live:
            outputs = [t for t in tensors_in(checkpoint(run, use_reentrant=False)) if t.requires_grad]
            gradients = [torch.empty_like(t) for t in outputs]
            live.now -= sum(t.nbytes for t in gradients)
            live.peak = live.now
            torch.autograd.backward(outputs, gradients)
        return live.peak


class _Masked(TorchDispatchMode):
    """Notes the FLOPs of torch's attention with a mask, of tokens over themselves and over others, and the bytes of the
    former's result with its log-sum-exp."""

    def __init__(self) -> None:
        super().__init__()
        self.within = self.across = 0.0
        self.kept = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is _MASKED:
            q, k = args[:2]
            if q.shape == k.shape:
                self.within += _scores(q.shape, k.shape)
                self.kept += q.nbytes + 4 * q.numel() // q.shape[-1]
            else:
                self.across += _scores(q.shape, k.shape)
        return func(*args, **(kwargs or {}))


class _Attended:
    """FLOPs of a block's attention over its own tokens and over others', and the bytes of the former's result.

    masked: what of it torch's own operations do, forward and backward for the input and the weights.
    """

    def __init__(self, flops: float, kept: int, masked: _Masked) -> None:
        self.within, self.across, self.kept = flops + masked.within, masked.across, kept + masked.kept
        forward = masked.within + masked.across
        self.masked = (forward, _ATTENTION_BACKWARD * forward, _ATTENTION_BACKWARD * forward)


class _Axis:
    """A `SequenceAxis` of planned ranks, on the first of them: sizes are right, and nothing is exchanged."""

    def __init__(self, shape: PassShape) -> None:
        self.size = shape.ring * shape.ulysses
        self._ring, self._ulysses = shape.ring, shape.ulysses
        self.reset()

    def reset(self) -> None:
        self.flops, self.kept = 0.0, 0

    def split(self, x: Tensor, dim: int) -> Tensor:
        return x.narrow(dim, 0, -(-x.shape[dim] // self.size))

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        return pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, length - x.shape[dim]])

    def mean(self, x: Tensor, dim: int, length: int) -> Tensor:
        return x.mean(dim)

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        batch, run, heads, head_size = q.shape
        queries = length if self._ring == 1 else self._ulysses * run
        self.flops += 4.0 * batch * queries * length * -(-heads // self._ulysses) * head_size
        self.kept += q.nbytes + 4 * batch * run * heads
        return attention(q, k, v)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError("families that are traced have masked attention over the text, or none")


def _fake(model: Any, dtype: torch.dtype) -> nn.Module:
    """The model's network with fake tensors on the CPU, in `dtype`. Fake ones cannot be cast in their places."""
    with unset_fake_temporarily(), torch.device("meta"):
        network: nn.Module = model.build()
    for part in network.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return network


def _as_leaf(x: Any) -> Any:
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def _scores(q: Any, k: Any, *_: Any, out_shape: Any = None, **__: Any) -> float:
    """FLOPs of attention by the shapes of queries and keys `[B, H, L, D]`."""
    batch, heads, length, head_size = q
    return 4.0 * batch * heads * length * k[2] * head_size


def _scores_backward(gradient: Any, q: Any, k: Any, *_: Any, out_shape: Any = None, **__: Any) -> float:
    return _ATTENTION_BACKWARD * _scores(q, k)
