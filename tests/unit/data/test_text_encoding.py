"""Prompt embeddings as the families' pipelines make them: with padding or without, masked or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, HunyuanVideo15Pipeline, LTXPipeline
from transformers import AutoTokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from sgmd_dist.data.encode import TextEncoder
from sgmd_dist.errors import UserError
from sgmd_dist.models import cogvideox
from sgmd_dist.models.base import TextEncoding
from sgmd_dist.models.cogvideox import CogVideoXConfig
from sgmd_dist.models.hunyuan_video_15 import HunyuanVideo15
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


def test_hunyuan_video_15_tells_its_captions_to_a_language_model(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    tokenizer.model_max_length = 1000
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    config = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=20, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, rope_parameters=rope,
    )  # fmt: skip
    Qwen2_5_VLTextModel(config).save_pretrained(tmp_path / "text_encoder")
    encoding = HunyuanVideo15.text_encoding
    assert encoding is not None and encoding.chat is not None
    assert (encoding.chat.num_cropped, encoding.chat.layer, encoding.max_tokens) == (108, -3, 1000)
    assert encoding.chat.system_message.startswith("You are a helpful assistant.")
    encoder = TextEncoder.from_pretrained(tmp_path, encoding=encoding)
    captions = [" ".join(["a red square moves left"] * 9), "a blue", ""]
    embeds, mask = HunyuanVideo15Pipeline._get_mllm_prompt_embeds(
        encoder.encoder, encoder.tokenizer, captions, torch.device("cpu")
    )
    found = encoder.encode(captions)
    assert len(found[0]) > 20
    for i, embed in enumerate(found):
        torch.testing.assert_close(embed, embeds[i][mask[i].bool()])


def test_the_padding_changes_what_an_unmasked_encoder_makes_of_a_caption() -> None:
    short = CAPTIONS[1:]
    masked, open_ = (encoder_of(TextEncoding(8, is_masked=m, is_cleaned=False)).encode(short)[0] for m in (True, False))
    assert masked.shape == open_.shape
    assert (masked - open_).abs().max() > 1e-3


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    with pytest.raises(UserError, match="tokenizer: has no chat template"):
        encoder_of(HunyuanVideo15.text_encoding)


def test_a_family_whose_text_encoder_is_not_built_is_refused() -> None:
    with pytest.raises(UserError, match=r"not encoded here; make shards .* launch/prepare.py index"):
        encoder_of(None)
