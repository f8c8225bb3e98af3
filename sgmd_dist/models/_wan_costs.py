"""FLOPs and activation bytes of a Wan's pass on one rank, by formulas.

Symbols: B samples, L tokens of a sample, c = ceil(L / ranks that share it), N = B c, T text tokens, E tokens of image
embeddings, D width, F width of the feed-forward layer, H heads, s bytes of a number in the compute dtype; M rows of
modulations: B, or N where each token has its timestep.

A block keeps for backward, in bytes (weights' gradient; in brackets what the input's gradient alone needs):

    float32 copies of the three norms' inputs            12 N D            (all)
    outputs of the modulated norms, of the feed-forward  12 N D            (none)
    rows' means, deviations, both attentions' lse        (36 + 8 H) N      (all)
    q, k, v, out; q and out over the text                6 s N D           (all)
    q, k and the text's q before their RMSNorm           3 r N D           (all)
    inputs of the projections, self-attention's result   4 s N D           (none)
    feed-forward before GELU, and behind it              2 s N F           (s N F)
    keys and values of the text                          (2 s + r) B T D   (2 s B T D)
    modulations and the two 1 + scale                    32 M D            (all)

and with image embeddings

    out over the image, its lse                          s N D + 4 H N     (all)
    the sum of both outs                                 s N D             (none)
    keys and values of the image                         (2 s + r) B E D   (2 s B E D)
    text and image once more for each projection, B > 1  2 s B (T + E) D   (none)

where r = s for a fused RMSNorm; torch's composite one on a CPU keeps its input and the normed product in float32: r = 8
(4 for the input's gradient). In float32 the first norm's input is the block's input, which is counted as that, and
without a norm before the text its float32 copy is missing. `tests/unit/planner` holds these against autograd.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from sgmd_dist.models._wan_image import NUM_EMBEDS, TEXT_TOKENS
from sgmd_dist.models.base import ActivationBytes, Flops, PassCosts, PassShape

# A flash-like kernel forms the scores again in its backward pass: 5 products of matrices for the forward's 2.
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class _Sizes:
    """The symbols of this file's head, by the names there."""

    B: int
    L: int
    c: int
    T: int
    E: int
    D: int
    F: int
    H: int
    M: int
    s: int

    @property
    def N(self) -> int:
        return self.B * self.c


def pass_costs(config: Mapping[str, Any], shape: PassShape, *, per_token: bool, item_bytes: int) -> PassCosts:
    """Costs of one pass of a `WanTransformer3DModel`.

    Args:
        config: its constructor's arguments.
        per_token: whether each token has its own timestep.
        item_bytes: of a number in the compute dtype, 2 or 4.
    """
    patch, heads = config["patch_size"], config["num_attention_heads"]
    length = prod(size // p for size, p in zip(shape.latent_shape[1:], patch, strict=True))
    run = -(-length // (shape.ring * shape.ulysses))
    sizes = _Sizes(
        B=shape.batch,
        L=length,
        c=run,
        T=TEXT_TOKENS if config["image_dim"] else shape.text_tokens,
        E=NUM_EMBEDS if config["image_dim"] else 0,
        D=heads * config["attention_head_dim"],
        F=config["ffn_dim"],
        H=heads,
        M=shape.batch * (run if per_token else 1),
        s=item_bytes,
    )
    values_in, values_out = (config[name] * prod(patch) for name in ("in_channels", "out_channels"))
    return PassCosts(
        num_blocks=config["num_layers"],
        linear=_times(config["num_layers"], _linear(sizes)),
        self_attention=_times(
            config["num_layers"], _attention(_self_attention(sizes, shape, config["attention_head_dim"]))
        ),
        cross_attention=_times(config["num_layers"], _attention(4.0 * sizes.N * (sizes.T + sizes.E) * sizes.D)),
        rest=_rest(sizes, config, values_in, values_out),
        activations=_activations(sizes, config, fused_norms=shape.fused_norms),
        output_numbers=sizes.N * values_out,
    )


def _times(count: int, flops: Flops) -> Flops:
    return Flops(count * flops.forward, count * flops.input, count * flops.weights)


def _linear(z: _Sizes) -> Flops:
    """Projections and feed-forward of a block; the keys and values of text and image are nothing to the
    input's gradient."""
    tokens = 2 * z.N * z.D * (6 * z.D + 2 * z.F)
    text = 4 * z.B * (z.T + z.E) * z.D * z.D
    return Flops(tokens + text, tokens, 2 * (tokens + text))


def _attention(forward: float) -> Flops:
    return Flops(forward, _ATTENTION_BACKWARD * forward, _ATTENTION_BACKWARD * forward)


def _self_attention(z: _Sizes, shape: PassShape, head_size: int) -> float:
    """Forward of this rank's heads, and of its ring chunk's queries, over all tokens."""
    queries = z.L if shape.ring == 1 else shape.ulysses * z.c
    return 4.0 * z.B * queries * z.L * -(-z.H // shape.ulysses) * head_size


def _rest(z: _Sizes, config: Mapping[str, Any], values_in: int, values_out: int) -> Flops:
    """Embedding of patches, time, text and image, and the last projection. What is embedded takes no gradient itself,
    but the image does behind its first norm."""
    image_dim = config["image_dim"] or 0
    patch, last = 2 * z.N * values_in * z.D, 2 * z.N * values_out * z.D
    first = 2 * z.M * config["freq_dim"] * z.D + 2 * z.B * z.T * config["text_dim"] * z.D
    behind = 2 * z.M * 7 * z.D * z.D + 2 * z.B * z.T * z.D * z.D + 2 * z.B * z.E * image_dim * (image_dim + z.D)
    return Flops(patch + first + behind + last, patch + last, patch + first + 2 * (behind + last))


def _activations(z: _Sizes, config: Mapping[str, Any], *, fused_norms: bool) -> ActivationBytes:
    s, tokens, text = z.s, z.N * z.D, z.B * z.T * z.D
    is_mixed = s < 4
    lse = 4 * z.N * z.H
    forward, backward = _transients(z)
    head = 4 * tokens + 8 * z.N + s * z.M * z.D  # the last norm's input in float32, its rows' statistics, 1 + scale
    embedded = s * z.M * (config["freq_dim"] + 4 * z.D) + s * z.B * z.T * (config["text_dim"] + 2 * z.D)
    embedded += z.B * z.E * ((3 * s + 4 * is_mixed) * (config["image_dim"] or 0) + 4 * z.D + 16)
    has_image = config["in_channels"] != config["out_channels"]
    joined = s * z.N * config["in_channels"] * prod(config["patch_size"]) if has_image else 0  # latents, mask, image
    rotary = 8 * z.c * config["attention_head_dim"]
    return ActivationBytes(
        block_input=s * tokens,
        input_saved=0 if is_mixed else s * tokens,
        attention=s * tokens + lse,
        block_saved=_saved(z, is_mixed=is_mixed, normed_text=config["cross_attn_norm"], fused_norms=fused_norms),
        block_forward=forward,
        block_backward=backward,
        shared=s * (text + z.B * z.E * z.D) + rotary,
        modulations=s * 6 * z.M * z.D,
        rest_saved=(head + joined, head + joined + (4 + s) * tokens + embedded),
    )


def _saved(z: _Sizes, *, is_mixed: bool, normed_text: bool, fused_norms: bool) -> tuple[int, int]:
    """What a block keeps, for the gradient of (its input, its weights), without its input."""
    s, tokens, text, inner = z.s, z.N * z.D, z.B * z.T * z.D, z.N * z.F
    copies = 4 * (is_mixed + normed_text + 1) * tokens
    statistics = (28 + 8 * normed_text + 8 * z.H) * z.N + 8 * z.D * (normed_text and is_mixed)
    modulations = 32 * z.M * z.D
    both = copies + statistics + modulations + 6 * s * tokens + 2 * s * text
    r_input, r_weights = (s, s) if fused_norms else (4, 8)
    for_input = both + 3 * r_input * tokens + s * inner
    kept_text = r_weights * text + 4 * z.B * z.T
    for_weights = both + 3 * r_weights * tokens + 2 * s * inner + (12 + 4 * s) * tokens + kept_text
    if not z.E:
        return for_input, for_weights
    image = z.B * z.E * z.D
    of_image = s * tokens + 4 * z.N * z.H + 2 * s * image
    copies = 2 * s * (text + image) if z.B > 1 else 0
    return for_input + of_image, for_weights + of_image + s * tokens + r_weights * image + 4 * z.B * z.E + copies


def _transients(z: _Sizes) -> tuple[int, tuple[int, int]]:
    """Peaks inside a block, by what the operations hold at their worst moments: in the rotary embedding, in a
    modulated norm, or around GELU."""
    s, tokens, inner, rows = z.s, z.N * z.D, z.N * z.F, z.M * z.D
    is_mixed = s < 4
    forward = max(
        (16 + 2 * s) * tokens + 24 * rows, 20 * tokens + 28 * rows, 3 * s * tokens + 2 * s * inner + 24 * rows
    )
    for_input = max((22 if is_mixed else 20) * tokens, 4 * tokens + 2 * s * inner, (12 + s) * tokens + s * inner)
    for_weights = max((16 if is_mixed else 12) * tokens, s * tokens + s * inner + 4 * rows)
    return forward, (for_input, for_weights)
