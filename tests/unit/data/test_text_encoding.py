"""Prompt embeddings as the families' pipelines make them: with padding or without, masked or not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, HunyuanVideo15Pipeline, LTXPipeline
from tiny_families import FAMILIES, LATENTS
from transformers import AutoTokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from sgmd_dist.assemble import build_model
from sgmd_dist.data.encode import TextEncoder
from sgmd_dist.data.format import read_negative_prompt
from sgmd_dist.data.negative_prompt import write_where_missing
from sgmd_dist.data.row_encoders import text_encoding_of, text_settings
from sgmd_dist.data.sources import open_shards, write_prompt_shards
from sgmd_dist.errors import UserError
from sgmd_dist.models import cogvideox
from sgmd_dist.models.base import TEXT_ENCODING, TextEncoding
from sgmd_dist.models.cogvideox import CogVideoXConfig
from sgmd_dist.models.hunyuan_video_15 import HunyuanVideo15
from sgmd_dist.models.ltx import Ltx
from sgmd_dist.recipe_file import load_recipe

TINY = Path(__file__).resolve().parents[3] / "recipes/tiny_wan"
CAPTIONS = ["a red square moves left", "a  blue"]


def encoder_of(encoding: TextEncoding | None) -> TextEncoder:
    return TextEncoder.from_pretrained(TINY, encoding=encoding)


def test_ltx_encodes_with_the_padding_and_leaves_it_out() -> None:
    encoder = encoder_of(Ltx.text_encoding)
    parts: dict[str, Any] = {"text_encoder": encoder.encoder, "tokenizer": encoder.tokenizer}
    pipe = LTXPipeline(scheduler=None, vae=None, transformer=None, **parts)
    embeds, mask = pipe._get_t5_prompt_embeds(CAPTIONS, max_sequence_length=128)
    found = encoder.encode(CAPTIONS)
    assert encoder.tokenizer.model_max_length < 128, "the pipeline adds as much padding, whatever the tokenizer says"
    assert len({len(embed) for embed in found}) == 2, "captions of two lengths"
    for i, embed in enumerate(found):
        torch.testing.assert_close(embed, embeds[i][mask[i]])


def cogvideox_folder(folder: Path) -> Path:
    """A pipeline's, whose network has prompts of 5 tokens."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("transformer", "vae", "model_index.json"))
    return FAMILIES["cogvideox"].save(folder)


def test_a_data_set_s_negative_prompt_is_encoded_as_its_prompts(tmp_path: Path) -> None:
    pipeline, shards = cogvideox_folder(tmp_path / "pipeline"), tmp_path / "shards"
    shards.mkdir()
    write_where_missing(shards, 32, None, pipeline)
    expected = TextEncoder.from_pretrained(pipeline, encoding=text_encoding_of(pipeline)).encode([""])[0]
    assert torch.equal(read_negative_prompt(shards), expected.bfloat16()) and len(expected) == 5


def test_prompts_without_the_padding_that_a_network_wants_are_refused(tmp_path: Path) -> None:
    pipeline, shards = cogvideox_folder(tmp_path / "pipeline"), tmp_path / "shards"
    with pytest.raises(UserError, match=r"captions of 4 tokens, expected 5: .* leave out --max-tokens"):
        TextEncoder.from_pretrained(pipeline, encoding=text_encoding_of(pipeline), max_tokens=4)
    write_prompt_shards(shards, CAPTIONS, encoder_of(TEXT_ENCODING), LATENTS)
    keys = [
        f"model={{family: cogvideox, pretrained: {pipeline}, text_tokens: 5}}",
        f"data.shards={tmp_path / 'shards'}",
    ]
    recipe = load_recipe(TINY.parent / "tiny_sgmd.yaml", keys)
    with pytest.raises(UserError, match="the negative prompt has 1 embeddings, expected 5"):
        open_shards(recipe, build_model(recipe, "generator"))


def test_what_another_way_of_encoding_makes_does_not_continue_a_preparation(tmp_path: Path) -> None:
    assert text_settings(TINY) == {}
    assert "max_tokens=5" in text_settings(cogvideox_folder(tmp_path / "pipeline"))["text_encoding"]


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
    with pytest.raises(UserError, match=r"tiny_wan/tokenizer: has no chat template, .* give the pipeline's own folder"):
        encoder_of(HunyuanVideo15.text_encoding)


def test_a_family_whose_text_encoder_is_not_built_is_refused() -> None:
    with pytest.raises(UserError, match=r"not encoded here; make shards .* launch/prepare.py index"):
        encoder_of(None)
