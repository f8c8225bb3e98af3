"""What can be sampled: a run, a checkpoint, or a folder of diffusers, as exports and pretrained models are.

A folder may lack what sampling needs: then options say it. Its recipe.yaml, where there is one, says what they do not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from torch import Tensor

from sgmd_dist import checkpoint, flow, registry
from sgmd_dist.assemble import Which, load_network
from sgmd_dist.data.image_encoder import IMAGE_PARTS
from sgmd_dist.data.sources import TEXT_PARTS, latent_shape_of
from sgmd_dist.decode import decoder
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import LatentShape, VideoModel
from sgmd_dist.prompts import Encoders, ImageSource, Prompts
from sgmd_dist.recipe import Recipe
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.rollout import Network
from sgmd_dist.sampling import few_steps_of, open_source, sample_video
from sgmd_dist.video_folder import Take, sheet_of, tile_of, write_index, write_sheet, write_take

PIPELINE_INDEX = "model_index.json"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
_TRANSFORMER, _SECOND = "transformer", "transformer_2"
_FAMILY = "wan"  # of a folder of which nothing tells it


@dataclass(frozen=True)
class Options:
    """What a command says in place of a model's own recipe; None leaves it to the recipe.

    Attributes:
        which: the weights of a checkpoint.
        num_steps, shift: of the chain.
        size: frames, height and width of the videos in pixels.
        pretrained: a diffusers folder with text encoder and VAE.
        recipe: a recipe's file, for a folder without one.
        family: the model family of a folder without recipe; None: wan.
    """

    which: Which = "generator"
    num_steps: int | None = None
    shift: float | None = None
    size: tuple[int, int, int] | None = None
    pretrained: Path | None = None
    recipe: Path | None = None
    family: str | None = None


@dataclass(frozen=True)
class Generator:
    """A network, and all that its videos depend on besides prompt and seed.

    Attributes:
        path: the checkpoint or folder.
        which: the weights.
        model: the network's architecture.
        load: makes the network on a device.
        sigmas: of the Euler chain, descending, the last one 0.
        shift: the time shift that made them, None where a scheduler did.
        text_encoder: a diffusers folder with one, and with its tokenizer.
        decoder: a diffusers folder that may have a VAE, or None.
        image_encoder: the same with an image encoder.
    """

    path: Path
    which: Which
    model: VideoModel
    load: Callable[[torch.device], Network]
    sigmas: list[float]
    shift: float | None
    latent_shape: LatentShape
    text_encoder: Path
    text_tokens: int
    decoder: Path | None
    image_encoder: Path | None

    @property
    def encoders(self) -> Encoders:
        """What encodes prompts for the network."""
        image = None
        if self.decoder is not None:
            image = ImageSource(self.decoder, self.image_encoder or self.decoder, self.latent_shape)
        return Encoders(self.model, self.text_encoder, self.text_tokens, image)


def open_generator(path: Path, options: Options) -> Generator:
    """Find out what is at `path`; reads no weights.

    Raises:
        UserError: it is nothing that can be sampled, or it lacks something that an option can say; or an option names
            what is not there, or says what the model's own recipe says.
    """
    _check_pretrained(options.pretrained)
    if (path / checkpoint.FOLDER).is_dir() or not any((path / name).exists() for name in _MARKS):
        return _of_checkpoint(_checkpoint(path), options)
    if (path / ADAPTER_FILE).exists():
        raise UserError(
            f"{path}: holds an adapter without its base; sample the run or checkpoint that it was exported from, or"
            " export that with --merge"
        )
    return _of_folder(path, options)


_MARKS = (PIPELINE_INDEX, _TRANSFORMER, "config.json", ADAPTER_FILE)


def _check_pretrained(folder: Path | None) -> None:
    if folder is not None and not any((folder / part).is_dir() for part in (*TEXT_PARTS, "vae")):
        raise UserError(
            f"--pretrained {folder}: expected a diffusers folder with {', '.join(TEXT_PARTS)} or vae (working directory"
            f" {Path.cwd()}); mend the path, or leave out --pretrained where the model has its own"
        )


def _checkpoint(path: Path) -> Path:
    try:
        return checkpoint.find(path)
    except UserError as error:
        raise UserError(
            f"{error}, or a diffusers folder with {PIPELINE_INDEX}, {_TRANSFORMER}/ or config.json"
        ) from None


def _of_checkpoint(path: Path, options: Options) -> Generator:
    if options.recipe is not None:
        raise UserError(f"--recipe {options.recipe}: {path} has the recipe of its training; leave out --recipe")
    source = open_source(path)
    recipe, model = source.recipe, source.model
    _check_family(path, recipe, options)
    folders = _parts_folders(None, recipe, options)
    num_steps, shift = options.num_steps, options.shift
    if num_steps is None or shift is None:
        trained = source.few_steps
        num_steps, shift = num_steps or trained[0], shift or trained[1]
    return Generator(
        source.checkpoint,
        options.which,
        model,
        lambda device: source.network(options.which, device),
        flow.sampling_sigmas(num_steps, shift),
        shift,
        _latent_shape(source.checkpoint, recipe, model, options),
        _text_encoder(source.checkpoint, folders),
        recipe.model.text_tokens,
        _having("vae", folders),
        _having(IMAGE_PARTS[0], folders),
    )


def _of_folder(path: Path, options: Options) -> Generator:
    if options.which != "generator":
        raise UserError(f"{path}: an export holds one set of weights; leave out --ema (launch/export.py has it too)")
    recipe = _recipe_of(path, options)
    if recipe is None:
        section = registry.load(registry.MODELS, options.family or _FAMILY).Section(pretrained=str(path))
    else:
        _check_family(path, recipe, options)
        section = recipe.model.model_copy(update={"pretrained": str(path)})
    if (path / _SECOND).is_dir() and not (path / PIPELINE_INDEX).exists():
        raise UserError(
            f"{path}: two transformers, and no {PIPELINE_INDEX} that says at which noise level they take turns; export"
            " the run with --pipeline, or sample the run"
        )
    model = registry.load(registry.MODELS, section.family).build(section, str(path), "MODEL")
    folders = _parts_folders(path, recipe, options)
    return Generator(
        path,
        options.which,
        model,
        lambda device: load_network(model, None, device),
        *_chain(path, recipe, options),
        _latent_shape(path, recipe, model, options),
        _text_encoder(path, folders),
        section.text_tokens,
        _having("vae", folders),
        _having(IMAGE_PARTS[0], folders),
    )


def _check_family(path: Path, recipe: Recipe, options: Options) -> None:
    if options.family not in (None, recipe.model.family):
        raise UserError(
            f"--family {options.family}: the recipe of {path} says model.family = {recipe.model.family}; leave out"
            " --family"
        )


def _recipe_of(path: Path, options: Options) -> Recipe | None:
    """The recipe that an option names, or the folder's own; None without either."""
    found = options.recipe or path / checkpoint.RECIPE_FILE
    return load_recipe(found) if options.recipe is not None or found.is_file() else None


def _parts_folders(path: Path | None, recipe: Recipe | None, options: Options) -> list[Path]:
    """The folders that may have text encoder and VAE, best first."""
    named = (recipe.data.text_encoder, recipe.model.pretrained) if recipe is not None else ()
    return [Path(folder) for folder in (options.pretrained, path, *named) if folder is not None]


def _text_encoder(path: Path, folders: list[Path]) -> Path:
    for folder in folders:
        if all((folder / part).is_dir() for part in TEXT_PARTS):
            return folder
    looked = f" (looked in {', '.join(map(str, folders))})" if folders else ""
    raise UserError(
        f"{path}: no folder with {' and '.join(TEXT_PARTS)} for it{looked}; name one with --pretrained FOLDER"
    )


def _having(part: str, folders: list[Path]) -> Path | None:
    return next((folder for folder in folders if (folder / part).is_dir()), None)


def _latent_shape(path: Path, recipe: Recipe | None, model: VideoModel, options: Options) -> LatentShape:
    if options.size is not None:
        try:
            return model.latent_shape(*options.size)
        except UserError as error:
            raise UserError(f"--size {'x'.join(map(str, options.size))}: {error}") from None
    if recipe is None:
        raise UserError(
            f"{path}: nothing says how large its videos are; add --size FRAMESxHEIGHTxWIDTH, or --recipe FILE"
        )
    try:
        return latent_shape_of(recipe, model)
    except UserError as error:
        raise UserError(f"{error}; or say how large the videos are with --size FRAMESxHEIGHTxWIDTH") from None


def _chain(path: Path, recipe: Recipe | None, options: Options) -> tuple[list[float], float | None]:
    """Sigmas, and the shift that makes them: as options say, else as the folder's own scheduler does, else as the
    recipe's training."""
    trained = None if recipe is None else few_steps_of(recipe)
    num_steps = options.num_steps or (trained and trained[0])
    if num_steps is None:
        raise UserError(f"{path}: nothing says how many steps it takes; add --steps N, or --recipe FILE")
    if options.shift is not None:
        return flow.sampling_sigmas(num_steps, options.shift), options.shift
    if (path / "scheduler").is_dir():
        return scheduler_sigmas(path / "scheduler", num_steps), None
    if trained is None:
        raise UserError(f"{path}: neither a scheduler nor a recipe; add --shift NUMBER, or --recipe FILE")
    return flow.sampling_sigmas(num_steps, trained[1]), trained[1]


def scheduler_sigmas(folder: Path, num_steps: int) -> list[float]:
    """The noise levels that a stock scheduler takes in `num_steps`, and a final 0.

    Raises:
        UserError: it cannot be read, or is none of flow matching.
    """
    try:
        name = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))["_class_name"]
        scheduler: Any = getattr(diffusers, name).from_pretrained(folder, local_files_only=True)
        scheduler.set_timesteps(num_steps)
        sigmas = [float(sigma) for sigma in scheduler.sigmas]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise UserError(
            f"{folder}: no scheduler with noise levels ({error}); choose them by --steps and --shift"
        ) from None
    if len(sigmas) != num_steps + 1 or not 1 >= sigmas[0] > 0 or sigmas != sorted(sigmas, reverse=True):
        raise UserError(
            f"{folder}: {name} takes the noise levels {sigmas}, expected {num_steps} from at most 1 down to 0; choose"
            " them by --steps and --shift"
        )
    return [*sigmas[:-1], 0.0]


def write_videos(
    generator: Generator,
    prompts: Prompts,
    takes: Sequence[Take],
    folder: Path,
    *,
    ending: str,
    frames_per_second: int,
    guidance_scale: float,
    sheet: str | None,
    device: torch.device,
) -> None:
    """Make a folder of videos (sgmd_dist/video_folder.py), each rank every n-th of n ranks', and print their names.

    They are sampled one by one: a video's bits depend on no other, and so not on the number of ranks. Collective.

    Args:
        ending: of the videos' files. sheet: of the sheet's, or None for no sheet.

    Raises:
        UserError: weights or VAE cannot be read, or a file cannot be written; on every rank.
    """

    def make_own() -> dict[Take, Tensor]:
        tiles: dict[Take, Tensor] = {}
        own = takes[dist.get_rank() :: dist.get_world_size()]
        if not own:
            return tiles
        network, to_rgb = generator.load(device), decoder(generator.decoder, device)
        for take in own:
            latents = sample_video(
                network,
                prompts,
                take.number,
                generator.latent_shape,
                sigmas=generator.sigmas,
                seed=take.seed,
                guidance_scale=guidance_scale,
                device=device,
            )
            rgb = to_rgb(latents)
            [path] = write_take(folder, take, rgb, [ending], frames_per_second)
            print(f"{path}: {take.caption}", flush=True)
            if sheet is not None:
                tiles[take] = tile_of(rgb)
        return tiles

    parts = checkpoint.together(make_own)
    if dist.get_rank() != 0:
        return
    facts = {
        "model": str(generator.path),
        "weights": generator.which,
        "steps": len(generator.sigmas) - 1,
        "shift": generator.shift,
        "sigmas": generator.sigmas,
        "guidance_scale": guidance_scale,
        **prompts.facts,
    }
    write_index(folder, takes, [ending], facts)
    if sheet is not None:
        tiles = {take: tile for part in parts for take, tile in part.items()}
        write_sheet(folder / f"sheet.{sheet}", sheet_of(takes, tiles))
        print(folder / f"sheet.{sheet}", flush=True)
