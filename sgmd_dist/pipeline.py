"""The generator as a whole diffusers pipeline, with a stock scheduler that takes the steps it was trained for.

    OUT/model_index.json  transformer/  (transformer_2/)  scheduler/  vae/  text_encoder/  tokenizer/
    OUT/README.md  recipe.yaml  the card

VAE, encoders and tokenizer are copies of the pretrained pipeline's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers import __version__ as diffusers_version
from torch import Tensor

from sgmd_dist import flow
from sgmd_dist.card import Origin, card, sigmas
from sgmd_dist.data.image_encoder import IMAGE_PARTS
from sgmd_dist.errors import UserError
from sgmd_dist.export import AS_TRAINED, Form, cast_to, write_verified
from sgmd_dist.models.base import VideoModel

INDEX = "model_index.json"
PARTS = ("vae", "text_encoder", "tokenizer")


def export_pipeline(
    weights: Mapping[str, Tensor],
    model: VideoModel,
    num_steps: int,
    shift: float,
    origin: Origin,
    folder: Path,
    form: Form = AS_TRAINED,
) -> int:
    """Write a pipeline's folder, verify its weights by reloading them; returns their count.

    Args:
        num_steps, shift: of the chain that the weights were trained for.

    Raises:
        UserError: see `export.export_diffusers`; or the pretrained pipeline's parts cannot be read, or no stock
            scheduler of the family's pipeline takes the sigmas.
    """
    call = model.scheduler_call
    if call is None:
        raise UserError(
            f"--pipeline: no scheduler of {type(model).__name__}'s diffusers pipeline takes the sigmas of the training;"
            " export the transformer without --pipeline and sample with launch/sample.py"
        )
    cast = cast_to(weights, form.dtype)

    def write(aside: Path) -> None:
        index = {"_diffusers_version": diffusers_version, **model.export_parts(cast, aside, form.max_shard_size)}
        made = scheduler(num_steps, shift) if call == "steps" else FlowMatchEulerDiscreteScheduler(shift=shift)
        made.save_pretrained(aside / "scheduler")
        index["scheduler"] = ["diffusers", type(made).__name__]
        for part in PARTS if model.image_input is None else (*PARTS, *IMAGE_PARTS):
            index[part] = _copy_part(origin.pretrained, part, aside)
        (aside / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        texts = _card(index["_class_name"], model, num_steps, shift, form.dtype, origin)
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")

    return write_verified(cast, folder, write, model.read_parts, form.notes)


def scheduler(num_steps: int, shift: float) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' Euler scheduler whose `set_timesteps(num_steps)` gives `flow.sampling_sigmas(num_steps, shift)`.

    The scheduler spaces its times evenly down to a small one, shifts them and stretches them to `shift_terminal`. That
    is a Möbius map of the step's number, as the wanted sigmas are, so equal ends and one equal sigma between make all
    equal, which a shift of the scheduler's own does.
    """
    wanted = flow.sampling_sigmas(num_steps, shift)[:-1]
    if num_steps == 1:
        return FlowMatchEulerDiscreteScheduler(shift=1.0)
    low, high = 1e-3, 1e3
    while num_steps > 2 and high / low > 1 + 1e-12:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if _sigmas(middle, num_steps, wanted[-1])[1] < wanted[1] else (low, middle)
    return FlowMatchEulerDiscreteScheduler(shift=high if num_steps > 2 else 1.0, shift_terminal=wanted[-1])


def _sigmas(shift: float, num_steps: int, terminal: float) -> np.ndarray:
    """What the scheduler makes of a shift and a terminal sigma."""
    times = np.linspace(1.0, flow.shift_sigma(1 / flow.NUM_TRAIN_TIMESTEPS, shift), num_steps)
    rest = 1 - flow.shift_sigma(times, shift)  # type: ignore[type-var]
    return 1 - rest * (1 - terminal) / rest[-1]


def _copy_part(pretrained: Path | None, part: str, folder: Path) -> list[str | None]:
    """Copy a part of the pretrained pipeline; returns its entry of the index."""
    source = None if pretrained is None else pretrained / part
    if source is None or not source.is_dir():
        return [None, None]
    try:
        entry = _class_of(source, part)
        shutil.copytree(source, folder / part)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{source}: cannot be read as a pipeline's {part} ({error}); mend model.pretrained") from None
    return entry


def _class_of(source: Path, part: str) -> list[str | None]:
    """Library and class of a part, by its own configuration."""
    names = {"tokenizer": "tokenizer_config.json", "image_processor": "preprocessor_config.json"}
    config = json.loads((source / names.get(part, "config.json")).read_text(encoding="utf-8"))
    if part == "vae":
        return ["diffusers", config["_class_name"]]
    if part == "image_processor":
        return ["transformers", config["image_processor_type"]]
    return ["transformers", config["tokenizer_class"] if part == "tokenizer" else config["architectures"][0]]


def _card(
    pipeline: str, model: VideoModel, num_steps: int, shift: float, dtype: torch.dtype, origin: Origin
) -> dict[str, str]:
    size = "".join(f"{name}={value}, " for name, value in origin.size.items())
    kind, inputs = ("text", "prompt") if model.image_input is None else ("image", "image, prompt")
    use = f"""\
    import torch
    from diffusers import {pipeline}

    pipe = {pipeline}.from_pretrained("THIS FOLDER", torch_dtype={dtype})
    video = pipe({inputs}, {size}num_inference_steps={num_steps}, guidance_scale=1.0).frames[0]

The scheduler takes the sigmas of the training: {sigmas((num_steps, shift))}. Other numbers of steps, and guidance, are
not what it was trained for."""
    return card(origin, f"A video generator of {num_steps} steps", use, kind)
