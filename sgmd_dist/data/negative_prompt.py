"""The negative prompt of a data set whose shards were made elsewhere."""

from __future__ import annotations

from pathlib import Path

from sgmd_dist.data.encode import NEGATIVE_PROMPT, TextEncoder
from sgmd_dist.data.foreign import read_negative_embeds
from sgmd_dist.data.format import NEGATIVE_PROMPT_NAME, write_negative_prompt
from sgmd_dist.data.row_encoders import text_encoding_of
from sgmd_dist.errors import UserError


def write_where_missing(
    folder: Path, embed_dim: int, copied_from: Path | None, text_encoder: Path | None
) -> str | None:
    """Give a data set its negative prompt; returns what there is to say, None where it has one.

    Args:
        embed_dim: D of the shards' prompt_embeds.
        copied_from: a data set's folder or a file, see `read_negative_embeds`.
        text_encoder: a diffusers folder to encode it with, as the pipeline of its transformer does.

    Raises:
        UserError: what is to be copied, or the text encoder, cannot be read or has another width.
    """
    path = folder / NEGATIVE_PROMPT_NAME
    if path.exists():
        return None
    if copied_from is not None:
        said, embeds = f"--negative-prompt-from {copied_from}", read_negative_embeds(copied_from)
    elif text_encoder is not None:
        encoder = TextEncoder.from_pretrained(text_encoder, encoding=text_encoding_of(text_encoder))
        said, embeds = f"--text-encoder {text_encoder}", encoder.encode([NEGATIVE_PROMPT])[0]
    else:
        return f"{path}: missing, training needs it; call again with --negative-prompt-from or --text-encoder"
    if embeds.shape[1] != embed_dim:
        raise UserError(f"{said}: is {embeds.shape[1]} wide, the shards' prompt_embeds {embed_dim}; take theirs")
    write_negative_prompt(folder, embeds)
    return f"{path}: written"
