"""Text encoders: captions to the unpadded prompt embeddings that shards store."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from sgmd_dist.errors import UserError
from sgmd_dist.models.base import TEXT_ENCODING, TextEncoding

try:
    import ftfy
except ImportError:  # optional in diffusers' Wan pipeline too, which cleans prompts with it where it is installed
    ftfy = None

TINY_MAX_TOKENS = 8
NEGATIVE_PROMPT = ""  # the unconditional side of guidance
_TINY_WIDTH = 32
_SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>"]  # their places are their ids, T5's


class TextEncoder:
    """Tokenizer and text encoder of a diffusers folder (subfolders `tokenizer` and `text_encoder`)."""

    def __init__(
        self,
        tokenizer: Any,
        encoder: transformers.PreTrainedModel,
        max_tokens: int,
        encoding: TextEncoding = TEXT_ENCODING,
    ) -> None:
        """encoding: how the pipeline makes embeddings of a caption; its `max_tokens` is not read."""
        self.tokenizer = tokenizer
        self.encoder = encoder.eval().requires_grad_(False)
        self.max_tokens = max_tokens
        self._encoding = encoding

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | str = "cpu",
        max_tokens: int | None = None,
        encoding: TextEncoding | None = TEXT_ENCODING,
    ) -> TextEncoder:
        """Load from local files only; the class comes from `architectures` in text_encoder/config.json.

        Captions are cut at `max_tokens`, by default the encoding's; where padding is masked, at the tokenizer's own
        model_max_length if that is shorter. An encoder that attends to the padding gets as much as its pipeline adds.

        Raises UserError naming what is missing, cannot be read or is another family's, or that there is no `encoding`
        or one of another length.
        """
        folder = Path(folder)
        encoding = known_encoding(encoding, str(folder))
        config_path = folder / "text_encoder" / "config.json"
        for path in (config_path, folder / "tokenizer" / "tokenizer_config.json"):
            if not path.is_file():
                raise UserError(
                    f"{path}: not found; expected a diffusers folder with tokenizer/ and text_encoder/ in {folder}"
                )
        encoder_class = _encoder_class(config_path)
        part = "tokenizer"
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder / part, local_files_only=True)
            part = "text_encoder"
            with _no_loading_bar():
                encoder, report = encoder_class.from_pretrained(
                    folder / part, dtype=dtype, local_files_only=True, output_loading_info=True
                )
            if missing := sorted(report["missing_keys"]):  # transformers would leave them random
                raise ValueError(f"{len(missing)} tensors are missing, as {missing[0]}")
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
            why = " ".join(str(error).split())[:300]
            raise UserError(
                f"{folder / part}: transformers cannot read it ({why}); download the folder again"
            ) from error
        if encoding.chat is not None and tokenizer.chat_template is None:
            raise UserError(
                f"{folder / 'tokenizer'}: has no chat template, and this model family's captions are told to a language"
                " model; give the pipeline's own folder"
            )
        longest = max_tokens or encoding.max_tokens
        if encoding.keeps_padding and longest != encoding.max_tokens:
            raise UserError(
                f"{folder}: captions of {longest} tokens, expected {encoding.max_tokens}: the padding of prompts is a"
                " part of this network's sequence; leave out --max-tokens"
            )
        if encoding.is_masked:
            longest = min(longest, tokenizer.model_max_length)
        return cls(tokenizer, encoder.to(device), longest, encoding)

    @property
    def width(self) -> int:
        """Embedding width D."""
        return int(self.encoder.config.hidden_size)

    @torch.no_grad()
    def encode(self, captions: Sequence[str], batch_size: int = 64) -> list[Tensor]:
        """One `[n_tokens, D]` tensor per caption, in the encoder's dtype, on the CPU.

        The pipeline's embeddings: special tokens included, at most `max_tokens` tokens, without padding unless the
        encoding keeps it.
        """
        embeds: list[Tensor] = []
        for start in range(0, len(captions), batch_size):
            texts = captions[start : start + batch_size]
            cleaned = [clean_caption(text) for text in texts] if self._encoding.is_cleaned else list(texts)
            hidden, kept = self._encode(cleaned) if self._encoding.chat is None else self._hear(cleaned)
            embeds.extend(row[keep].clone() for row, keep in zip(hidden.cpu(), kept.cpu(), strict=True))
        return embeds

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """The encoder's output `[B, n, D]`, and which of it are embeddings, `[B, n]` bool."""
        how = self._encoding
        padding = True if how.is_masked else "max_length"
        tokens = self.tokenizer(
            texts, padding=padding, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.encoder.device)
        mask = tokens.attention_mask
        hidden = self.encoder(tokens.input_ids, mask if how.is_masked else None).last_hidden_state
        return hidden, torch.ones_like(mask, dtype=torch.bool) if how.keeps_padding else mask.bool()

    def _hear(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """As `_encode`, of a language model that is told the captions."""
        chat = self._encoding.chat
        assert chat is not None
        said = [
            [{"role": "system", "content": chat.system_message}, {"role": "user", "content": text or " "}]
            for text in texts
        ]
        tokens = self.tokenizer.apply_chat_template(
            said,
            add_generation_prompt=True,
            return_dict=True,
            padding=True,
            truncation=True,
            max_length=self.max_tokens + chat.num_cropped,
            return_tensors="pt",
        ).to(self.encoder.device)
        states = self.encoder(tokens.input_ids, tokens.attention_mask, output_hidden_states=True).hidden_states
        return states[chat.layer][:, chat.num_cropped :], tokens.attention_mask[:, chat.num_cropped :].bool()


def known_encoding(encoding: TextEncoding | None, said: str) -> TextEncoding:
    """The encoding, where there is one.

    Raises:
        UserError: there is none; the message begins with `said`.
    """
    if encoding is None:
        raise UserError(
            f"{said}: captions of this model family are not encoded here; make shards with prompt embeddings elsewhere,"
            " index them with python launch/prepare.py index, and name them in data.shards"
        )
    return encoding


def clean_caption(caption: str) -> str:
    """The Wan pipeline's cleaning: mended encoding (with ftfy installed), HTML entities resolved, single blanks."""
    if ftfy is not None:
        caption = ftfy.fix_text(caption)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(caption))).strip()


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Hide the bar that transformers draws over the weights, which breaks up the trainer's own and scripts' output."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _encoder_class(config_path: Path) -> Any:
    try:
        architectures = json.loads(config_path.read_text(encoding="utf-8")).get("architectures") or ["AutoModel"]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config_path}: is not a model's JSON ({error}); download the folder again") from None
    encoder_class = getattr(transformers, architectures[0], None)
    if encoder_class is None:
        raise UserError(
            f"{config_path}: architectures={architectures}: transformers {transformers.__version__} has no such class; "
            "expected for example UMT5EncoderModel"
        )
    return encoder_class


def make_tiny_text_encoder(folder: str | Path, captions: Sequence[str], seed: int = 0) -> None:
    """Write `tokenizer/` and `text_encoder/` of a few thousand random, seeded parameters into `folder`.

    A word-level tokenizer over the words of `captions` and a one-layer UMT5 encoder, in Wan's file layout. Random
    weights suffice: every word has its own random direction, so captions that differ in a word stay well apart.
    """
    words = sorted({word for caption in captions for word in clean_caption(caption).split()})
    tokenizer = _word_tokenizer(words)
    tokenizer.save_pretrained(Path(folder) / "tokenizer")
    config = transformers.UMT5Config(
        vocab_size=len(tokenizer),
        d_model=_TINY_WIDTH,
        d_kv=16,
        d_ff=_TINY_WIDTH,
        num_heads=2,
        num_layers=1,
        num_decoder_layers=1,
        dropout_rate=0.0,
        pad_token_id=_SPECIAL_TOKENS.index("<pad>"),
        eos_token_id=_SPECIAL_TOKENS.index("</s>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = transformers.UMT5EncoderModel(config)
    encoder.save_pretrained(Path(folder) / "text_encoder")


def _word_tokenizer(words: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate([*_SPECIAL_TOKENS, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=TINY_MAX_TOKENS,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
