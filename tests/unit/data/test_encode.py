"""Text encoders from diffusers folders, and the tiny one that the world ships."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sgmd_dist.data.encode import TextEncoder, clean_caption, make_tiny_text_encoder
from sgmd_dist.data.world import all_captions
from sgmd_dist.errors import UserError

SHIPPED = Path(__file__).parents[3] / "recipes" / "tiny_wan"


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder.from_pretrained(SHIPPED)


def test_a_caption_becomes_its_words_and_an_end_token_without_padding(encoder):
    long, empty = encoder.encode(["a red ball moving left", ""])
    assert long.shape == (6, encoder.width)
    assert empty.shape == (1, encoder.width)
    assert long.dtype == torch.float32


def test_an_embedding_does_not_depend_on_its_neighbours_in_the_batch(encoder):
    captions = ["a red ball moving left", "", "ball"]
    together = encoder.encode(captions)
    for caption, expected in zip(captions, together, strict=True):
        assert torch.allclose(encoder.encode([caption])[0], expected, atol=1e-5)
    for one, other in zip(encoder.encode(captions, batch_size=1), together, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_captions_of_the_world_are_far_apart(encoder):
    embeds = torch.stack(encoder.encode(all_captions())).flatten(1)
    distances = torch.cdist(embeds, embeds).fill_diagonal_(torch.inf)
    assert distances.min() > 0.4 * embeds.norm(dim=1).mean()


def test_too_long_captions_are_cut(encoder):
    assert encoder.encode(["red " * 50])[0].shape[0] == encoder.max_tokens == 8
    assert TextEncoder.from_pretrained(SHIPPED, max_tokens=4).encode(["red " * 50])[0].shape[0] == 4


def test_the_dtype_is_the_one_asked_for():
    assert TextEncoder.from_pretrained(SHIPPED, torch.bfloat16).encode(["a ball"])[0].dtype == torch.bfloat16


@pytest.mark.parametrize("shown", [True, False])
def test_loading_draws_no_bar_and_leaves_others_bars_as_they_were(capfd, shown: bool):
    bars = transformers.utils.logging
    bars.enable_progress_bar() if shown else bars.disable_progress_bar()
    try:
        TextEncoder.from_pretrained(SHIPPED)
        assert bars.is_progress_bar_enabled() is shown
    finally:
        bars.enable_progress_bar()
    assert capfd.readouterr().err == ""


def test_captions_are_cleaned_as_wans_pipeline_does():
    assert clean_caption("  a &amp;amp; b\n\tc ") == "a & b c"


def test_the_shipped_encoder_is_what_its_maker_writes(encoder, tmp_path):
    make_tiny_text_encoder(tmp_path, all_captions())
    made = TextEncoder.from_pretrained(tmp_path)
    assert made.tokenizer.get_vocab() == encoder.tokenizer.get_vocab()
    assert sum(parameter.numel() for parameter in made.encoder.parameters()) < 10_000
    for name, tensor in encoder.encoder.state_dict().items():
        assert torch.allclose(made.encoder.state_dict()[name], tensor, atol=1e-6), name


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"text_encoder/config.json: not found"):
        TextEncoder.from_pretrained(tmp_path)


def test_an_unknown_architecture_is_named(tmp_path):
    make_tiny_text_encoder(tmp_path, ["a ball"])
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace("UMT5EncoderModel", "NoSuchModel"))
    with pytest.raises(UserError, match="NoSuchModel"):
        TextEncoder.from_pretrained(tmp_path)


def without_embeddings(folder: Path) -> None:
    """transformers would fill what is missing with random numbers and go on."""
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors["shared.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "half a config": ("text_encoder/config.json", lambda f: (f / "text_encoder/config.json").write_text("{")),
    "no object": ("text_encoder/config.json", lambda f: (f / "text_encoder/config.json").write_text("[]")),
    "half a tokenizer": ("tokenizer", lambda f: (f / "tokenizer/tokenizer.json").write_text("{")),
    "no tokenizer": ("tokenizer", lambda f: (f / "tokenizer/tokenizer.json").unlink()),
    "no weights": ("text_encoder", lambda f: (f / "text_encoder/model.safetensors").unlink()),
    "empty weights": ("text_encoder", lambda f: (f / "text_encoder/model.safetensors").write_bytes(b"")),
    "missing tensors": ("text_encoder", without_embeddings),
    "another width": (
        "text_encoder",
        lambda f: (f / "text_encoder/config.json").write_text(
            json.dumps(json.loads((f / "text_encoder/config.json").read_text()) | {"d_model": 48})
        ),
    ),
}


@pytest.mark.parametrize("part, damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_part_is_named(wan_copy: Path, part: str, damage: Callable[[Path], object]):
    damage(wan_copy)
    with pytest.raises(UserError, match=rf"{wan_copy}/{part}: .*; download the folder again"):
        TextEncoder.from_pretrained(wan_copy)
