"""Prompt embeddings as the families' pipelines make them: with padding or without, masked or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, LTXPipeline

from sgmd_dist.data.encode import TextEncoder
from sgmd_dist.errors import UserError
from sgmd_dist.models import cogvideox
from sgmd_dist.models.base import TextEncoding
from sgmd_dist.models.cogvideox import CogVideoXConfig
from sgmd_dist.models.ltx import Ltx

TINY = Path(__file__).resolve().parents[3] / "recipes/tiny_wan"
CAPTIONS = ["a red square moves left", "a  blue"]


def encoder_of(encoding: TextEncoding | None) -> TextEncoder:
    return TextEncoder.from_pretrained(TINY, encoding=encoding)


def test_ltx_encodes_with_the_padding_and_leaves_it_out() -> None:
    encoder = encoder_of(Ltx.text_encoding)
    parts: dict[str, Any] = {"text_encoder": encoder.encoder, "tokenizer": encoder.tokenizer}
    pipe = LTXPipeline(scheduler=None, vae=None, transformer=None, **parts)
    embeds, mask = pipe._get_t5_prompt_embeds(CAPTIONS, max_sequence_length=8)
    found = encoder.encode(CAPTIONS)
    assert len({len(embed) for embed in found}) == 2, "captions of two lengths"
    for i, embed in enumerate(found):
        torch.testing.assert_close(embed, embeds[i][mask[i]])


def test_cogvideox_keeps_the_padding() -> None:
    config = CogVideoXConfig(max_text_seq_length=8)
    model = cogvideox.build(cogvideox.Section(text_tokens=8, config=config), None, "model.pretrained")
    encoder = encoder_of(model.text_encoding)
    parts: dict[str, Any] = {"text_encoder": encoder.encoder, "tokenizer": encoder.tokenizer}
    pipe = CogVideoXPipeline(vae=None, transformer=None, scheduler=None, **parts)
    embeds = pipe._get_t5_prompt_embeds(CAPTIONS, max_sequence_length=8)
    torch.testing.assert_close(torch.stack(encoder.encode(CAPTIONS)), embeds)


def test_the_padding_changes_what_an_unmasked_encoder_makes_of_a_caption() -> None:
    short = CAPTIONS[1:]
    masked, open_ = (encoder_of(TextEncoding(8, is_masked=m, is_cleaned=False)).encode(short)[0] for m in (True, False))
    assert masked.shape == open_.shape
    assert (masked - open_).abs().max() > 1e-3


def test_a_family_whose_text_encoder_is_not_built_is_refused() -> None:
    with pytest.raises(UserError, match=r"not encoded here; make shards .* launch/prepare.py index"):
        encoder_of(None)
