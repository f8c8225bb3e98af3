"""What a model family tells the rest of the project.

A family's module defines `NETWORK` (the diffusers class that its folders name), `Section` (its part of a recipe) and
`build(section, pretrained, key)`, which returns a `VideoModel`. The object holds no weights: it builds a network, names
its parts, and feeds it. Its `architecture(section, pretrained, key)` returns the same also where the pretrained folder
is not there and the section says what it would hold; such a `VideoModel` has no weight files. A family on one diffusers
transformer finds most of it written in `_diffusers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sgmd_dist.conditions import Condition

LatentShape = tuple[int, int, int, int]  # (C, F, H, W) of one video's latents
Gradient = Literal["none", "input", "weights"]  # what backward computes: nothing, the input's gradient, or the weights'
MAX_SHARD_SIZE = "5GB"  # of a file of an exported folder

# How a family's pipeline asks its scheduler: by a number of steps, or with times 1, 1 - 1/n, ... that it then shifts.
SchedulerCall = Literal["steps", "sigmas"]


@dataclass(frozen=True)
class Chat:
    """A caption as what a user says to a language model, whose hidden states are the embeddings.

    Attributes:
        system_message: what the model was told before.
        num_cropped: tokens before the caption, whose states are left out.
        layer: of the hidden states, counted from the end.
    """

    system_message: str
    num_cropped: int
    layer: int


@dataclass(frozen=True)
class TextEncoding:
    """How a family's pipeline makes embeddings of a caption.

    Attributes:
        max_tokens: a caption is cut to so many.
        is_masked: the encoder's attention leaves padding out. Otherwise captions are filled up to `max_tokens` and the
            encoder attends to the padding.
        keeps_padding: the embeddings of the padding are a part of the prompt's, as the network was trained with them.
        is_cleaned: encoding mended, HTML entities resolved, single blanks.
        chat: where the encoder is a language model.
    """

    max_tokens: int
    is_masked: bool = True
    keeps_padding: bool = False
    is_cleaned: bool = True
    chat: Chat | None = None


TEXT_ENCODING = TextEncoding(512)  # Wan's, and that of folders without a transformer


@dataclass(frozen=True)
class AttentionShape:
    """Self-attention of a network: blocks, heads and the size of a head."""

    num_blocks: int
    num_heads: int
    head_size: int


@dataclass(frozen=True)
class PassShape:
    """One pass as a rank computes it: samples, latents, text tokens, and the ring x ulysses ranks that share a sample.

    `fused_norms`: whether torch's RMSNorm is one kernel, as on CUDA; on a CPU it keeps more for backward.
    """

    batch: int
    latent_shape: LatentShape
    text_tokens: int
    ring: int = 1
    ulysses: int = 1
    fused_norms: bool = True


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a part of a pass: forward, and backward for the input alone or for the weights."""

    forward: float
    input: float
    weights: float

    def backward(self, gradient: Gradient) -> float:
        """The backward operations for `gradient`."""
        return {"none": 0.0, "input": self.input, "weights": self.weights}[gradient]


@dataclass(frozen=True)
class ActivationBytes:
    """Activations of a pass on a rank; gradients to the input or the weights, in pairs (input, weights).

    Attributes:
        block_input: a block's input: what checkpointing keeps of a block.
        input_saved: what of it autograd keeps without checkpointing.
        attention: the output of a block's self-attention with its log-sum-exp: what selective checkpointing keeps
            besides.
        block_saved: what autograd keeps of a block, without its input.
        block_forward: the peak inside a block's forward without a graph, without its input.
        block_backward: the peak above `block_saved` while a block is recomputed and run backward.
        shared: what all blocks read: the text, rotary angles.
        modulations: what all blocks derive their own modulations from; checkpointing keeps it, autograd does not.
        rest_saved: what autograd keeps of the layers before and behind the blocks, `shared` apart.
    """

    block_input: int
    input_saved: int
    attention: int
    block_saved: tuple[int, int]
    block_forward: int
    block_backward: tuple[int, int]
    shared: int
    modulations: int
    rest_saved: tuple[int, int]


@dataclass(frozen=True)
class PassCosts:
    """What one pass of a network costs a rank.

    Attributes:
        num_blocks: blocks that the pass runs.
        linear, self_attention, cross_attention: of all blocks together.
        rest: of the layers before and behind them.
        activations: bytes.
        output_numbers: numbers that the rank's last projection makes.
    """

    num_blocks: int
    linear: Flops
    self_attention: Flops
    cross_attention: Flops
    rest: Flops
    activations: ActivationBytes
    output_numbers: int

    @property
    def parts(self) -> tuple[Flops, ...]:
        return self.linear, self.self_attention, self.cross_attention, self.rest


@dataclass(frozen=True)
class ImageInput:
    """What an image-to-video network takes beside the text: the image as latents, and in some its embeddings.

    `num_embeds` embeddings of `embed_dim` numbers each; 0 where it takes none. `unused_tensors`: parts of the names of
    tensors that published files hold beside those of the network, which has no use for them.
    """

    num_embeds: int = 0
    embed_dim: int = 0
    unused_tensors: tuple[str, ...] = ()


class SequenceAxis(Protocol):
    """The ranks that share a sequence, `size` of them, as a network meets them. With one rank nothing is split."""

    size: int

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's run of the tokens along `dim`, filled up with zeros: all ranks' runs have one length."""
        ...

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """All ranks' runs, cut to `length` tokens along `dim`."""
        ...

    def mean(self, x: Tensor, dim: int, length: int) -> Tensor:
        """The mean along `dim` over the `length` tokens of all ranks' runs, equal on all ranks."""
        ...

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        """Attention over the whole sequence of `length` tokens, from and to this rank's run `[B, c, H, D]`."""
        ...

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of this rank's run `[B, c, H, D]` over keys `[B, K, H, D]` that every rank has whole."""
        ...


class RunnableModel(Protocol):
    """How a network is run: what training in one process needs, without building, sharding and files.

    A model may have experts: networks of one architecture inside its module, of which a forward pass runs the one that
    serves the batch's noise levels.

    Attributes:
        boundaries: the noise levels in (0, 1), ascending, from which the next expert serves; none with one network.
        image_input: what an image-to-video network takes of an image; None for text to video.
    """

    boundaries: tuple[float, ...]
    image_input: ImageInput | None

    def velocity(
        self, module: nn.Module, latents: Tensor, sigma: Tensor, condition: Condition, level: float | None = None
    ) -> Tensor:
        """Run the network.

        Args:
            latents: `[B, C, F, H, W]`, any float dtype; cast to the compute dtype here.
            sigma: `[B]` noise levels in [0, 1], float32.
            condition: prompt embeddings `[B, T, D]`, or those and an image; see `sgmd_dist.conditions`.
            level: any noise level that the same expert serves as all of `sigma`, equal on all ranks. A model with
                experts chooses by it and needs it; see `sgmd_dist.flow`.

        Returns:
            The velocity `[B, C, F, H, W]`, float32.

        Raises:
            UserError: an image-to-video network was given no image.
        """
        ...

    def smallest_latents(self) -> LatentShape:
        """The smallest shape that the network accepts, for warm-up runs."""
        ...

    def text_dim(self) -> int:
        """Width D of the prompt embeddings."""
        ...


class VideoModel(RunnableModel, Protocol):
    """One network architecture with its conventions.

    A network's output is a tuple with the velocity first, a block's output its tokens `[B, c, D]` or a tuple with them
    first: see `sgmd_dist.heads`.

    Attributes:
        config: the network's constructor's arguments.
        splits_sequences: whether `attach` takes an axis of several ranks.
        has_fused_blocks: whether `fuse` may be called.
        text_encoding: None where the project cannot make the family's prompt embeddings.
        scheduler_call: None where no stock scheduler takes the sigmas of a training.
    """

    config: dict[str, Any]
    compute_dtype: torch.dtype
    splits_sequences: bool
    has_fused_blocks: bool
    text_encoding: TextEncoding | None
    scheduler_call: SchedulerCall | None

    def build(self) -> nn.Module:
        """The network, on the current default device (`torch.device("meta")` as a context builds it empty)."""
        ...

    def networks(self, module: nn.Module) -> list[nn.Module]:
        """The networks in `module` that run by themselves, from the lowest noise levels up: `module`, or its experts.

        Each is sharded as a whole of its own, so that a forward pass gathers the network that it runs and no other.
        """
        ...

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """A network's repeated blocks, in forward order: the units of checkpointing, compilation and sharding."""
        ...

    def attach(self, module: nn.Module, axis: SequenceAxis) -> None:
        """Make the network run its attention through `axis`, on this rank's run of the tokens.

        Called once, before the network is checkpointed, compiled and sharded; its inputs and output stay whole.
        """
        ...

    def fuse(self, module: nn.Module) -> None:
        """Make the network's blocks run the fused operations of sgmd_kernels, with the same parameters.

        Called after `attach`, before the network is checkpointed, compiled and sharded.
        """
        ...

    def lora_targets(self) -> tuple[str, ...]:
        """The linear layers of a block that adapters may hang on, by the ends of their names."""
        ...

    def attention_shape(self) -> AttentionShape:
        """Blocks, heads and head size, for plans and for the choice of a kernel."""
        ...

    def num_tokens(self, latent_shape: LatentShape) -> int:
        """Length L of the sequence that latents of this shape make."""
        ...

    def pass_costs(self, shape: PassShape) -> PassCosts:
        """FLOPs and activation bytes of one pass, which runs one of the model's networks, by formulas."""
        ...

    def reset_buffers(self, module: nn.Module, device: torch.device) -> None:
        """Recompute buffers that no file holds, on the device that computes, after the network left meta."""
        ...

    def initial_value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Random initial value of the parameter `name`: float32 on the CPU, a function of (name, seed)."""
        ...

    def weight_files(self) -> dict[str, list[Path]]:
        """The safetensors files of the pretrained network; empty where it starts from random weights.

        By prefix: the parameter `prefix + name` is the tensor `name` of one of the files.
        """
        ...

    def latent_shape(self, num_frames: int, height: int, width: int) -> LatentShape:
        """Latent shape of a video of so many frames and pixels, by the strides of the family's VAE.

        Raises:
            UserError: these sizes do not make whole latents and patches; the message names `data.video`'s key.
        """
        ...

    def export(self, state_dict: dict[str, Tensor], folder: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
        """Write a full (unsharded) state dict as the family's diffusers folder, in the dtype of its tensors.

        Args:
            max_shard_size: larger networks are split into files of at most this size, as diffusers takes it: "5GB".
        """
        ...

    def read_export(self, folder: Path) -> dict[str, Tensor]:
        """Load an exported folder with diffusers' own loader; returns its state dict."""
        ...

    def export_parts(
        self, state_dict: dict[str, Tensor], folder: Path, max_shard_size: str = MAX_SHARD_SIZE
    ) -> dict[str, Any]:
        """Write parameters as the transformers of a pipeline's folder; returns the pipeline's class and what else its
        model_index.json says of them."""
        ...

    def read_parts(self, folder: Path) -> dict[str, Tensor]:
        """Parameters of the transformers of a pipeline's folder."""
        ...

    def export_adapter(self, weights: dict[str, Tensor], facts: dict[str, Any], folder: Path) -> None:
        """Write an adapter's tensors, by diffusers' names, as a LoRA that the family's diffusers pipeline loads.

        Args:
            facts: arguments of peft's `LoraConfig`, stored in the file.
        """
        ...

    def read_adapter(self, folder: Path) -> dict[str, Tensor]:
        """Load an exported adapter with diffusers' own loader; returns its tensors by diffusers' names."""
        ...


@runtime_checkable
class OriginalNames(Protocol):
    """A `VideoModel` whose tensors also have the names of the model's first release, outside of diffusers."""

    def export_original(self, state_dict: dict[str, Tensor], folder: Path) -> None:
        """Write parameters by those names, one safetensors file for each network."""
        ...

    def read_original(self, folder: Path) -> dict[str, Tensor]:
        """Load such a folder by diffusers' own conversion; returns its parameters."""
        ...

    def export_original_adapter(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write an adapter's tensors by those names, one safetensors file for each network, alpha as the rank."""
        ...

    def read_original_adapter(self, folder: Path) -> dict[str, Tensor]:
        """Load such a folder with diffusers' own loader; returns its tensors by diffusers' names."""
        ...
