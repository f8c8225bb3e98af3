"""What scores were measured with, stored beside them: only scores of one protocol may be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sgmd_dist import __version__, checkpoint
from sgmd_dist.assemble import Which, build_model
from sgmd_dist.checkpoint.folder import digest
from sgmd_dist.data.digest import content_digest
from sgmd_dist.data.encode import NEGATIVE_PROMPT
from sgmd_dist.data.sources import TEXT_PARTS
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import LatentShape
from sgmd_dist.prompts import Prompt, encoders_of, image_parts
from sgmd_dist.recipe import Recipe
from sgmd_dist.sampling import Source

SCORES_FILE, PROTOCOL_FILE = "scores.json", "protocol.json"
REFERENCE_SEED, SAMPLE_SEED = 1, 2
VERSION = 1  # of what the scores mean


@dataclass(frozen=True)
class Protocol:
    """What decides on the scores of a generator, and is the same for all that are compared.

    Attributes:
        prompts: captions.
        repeats: videos per caption; video i is of caption i modulo their number, and of noise (seed, i).
        latent_shape: (C, F, H, W).
        teacher_steps, student_steps: Euler steps.
        sigma_shift: time shift of both.
        guidance_scale: of the teacher; the generator has none.
        negative_prompt: the other side of guidance.
        teacher, text_encoder: digests of their files (`data.digest.content_digest`).
        reference_seed: of the teacher's videos that all are held against. sample_seed: of the videos that are scored.
        real: fingerprint of the shards with real videos, None without. num_real: how many of them, the first.
        images: sha256 of the picture that each prompt of an image-to-video model begins with; None of another model.
        image_encoders: digest of what encodes them; None likewise.
        version: of the scores' definitions.
    """

    prompts: list[str]
    repeats: int
    latent_shape: LatentShape
    teacher_steps: int
    student_steps: int
    sigma_shift: float
    guidance_scale: float
    negative_prompt: str
    teacher: str
    text_encoder: str
    reference_seed: int = REFERENCE_SEED
    sample_seed: int = SAMPLE_SEED
    real: str | None = None
    num_real: int = 0
    images: list[str] | None = None
    image_encoders: str | None = None
    version: int = VERSION

    @property
    def captions(self) -> list[str]:
        """The caption of every video."""
        return self.prompts * self.repeats

    def as_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Evaluated:
    """What was scored, and where: may differ between scores that are compared.

    `checkpoint_sha256` is of the checksums that the checkpoint's description holds of all its tensors and files.
    `device` and `num_ranks` decide on the seconds; they, `batch_size` and `versions` also on rounding.
    """

    run: str
    step: int
    which: Which
    checkpoint: str
    checkpoint_sha256: str
    compute_dtype: str
    device: str
    num_ranks: int
    batch_size: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Stored:
    """Scores of an earlier evaluation, `scores[column][name]`, with their protocol."""

    path: Path
    scores: dict[str, dict[str, float]]
    protocol: dict[str, Any]
    evaluated: dict[str, Any]


def digest_of_teacher(recipe: Recipe) -> str:
    """Of the teacher's weight files with what lies beside them; of its architecture and seed where it has none."""
    files = build_model(recipe, "teacher").weight_files()
    folders = dict.fromkeys(path.parent for paths in files.values() for path in paths)
    if folders:
        return content_digest(folders)
    facts = [recipe.model.for_role("teacher").model_dump(mode="json"), recipe.run.seed]
    return _sha256(facts)


def _sha256(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def protocol_of(
    source: Source,
    prompts: Sequence[Prompt],
    repeats: int,
    latent_shape: LatentShape,
    teacher_steps: int,
    real: str | None = None,
    num_real: int = 0,
) -> Protocol:
    """The protocol for a checkpoint: what is not given follows from its recipe.

    Raises:
        UserError: the recipe trains no few-step generator.
    """
    student_steps, sigma_shift = source.few_steps
    encoders = encoders_of(source.recipe, source.model, "--prompts")
    image_folders = image_parts(encoders, "--prompts")
    images = [digest(prompt.image) for prompt in prompts if prompt.image is not None] if image_folders else None
    objective: Any = source.recipe.objective  # a distillation's, as it has few steps
    return Protocol(
        prompts=[prompt.caption for prompt in prompts],
        repeats=repeats,
        latent_shape=latent_shape,
        teacher_steps=teacher_steps,
        student_steps=student_steps,
        sigma_shift=sigma_shift,
        guidance_scale=objective.guidance_scale.at(source.recipe.run.steps),
        negative_prompt=NEGATIVE_PROMPT,
        teacher=digest_of_teacher(source.recipe),
        text_encoder=content_digest(encoders.text / part for part in TEXT_PARTS),
        real=real,
        num_real=num_real,
        images=images,
        image_encoders=content_digest(image_folders) if image_folders else None,
    )


def evaluated_of(source: Source, which: Which, device: torch.device, num_ranks: int, batch_size: int) -> Evaluated:
    """What a checkpoint says of itself, and this machine."""
    meta = checkpoint.read_meta(source.checkpoint)
    return Evaluated(
        run=source.recipe.run.name,
        step=meta.step,
        which=which,
        checkpoint=source.checkpoint.name,
        checkpoint_sha256=_sha256([meta.checksums, meta.digests]),
        compute_dtype=source.recipe.model.compute_dtype,
        device=_name_of(device),
        num_ranks=num_ranks,
        batch_size=batch_size,
        versions={"sgmd_dist": __version__, "torch": torch.__version__},
    )


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def read_stored(where: Path) -> Stored:
    """The scores in the file or folder `where`, with the protocol beside them.

    Raises:
        UserError: there are none, or they are of a version that kept no such protocol.
    """
    path = where / SCORES_FILE if where.is_dir() else where
    beside = path.with_name(PROTOCOL_FILE)
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        content = json.loads(beside.read_text(encoding="utf-8"))
        if not all(isinstance(x, dict) for x in (scores, content["protocol"], content["evaluated"], *scores.values())):
            raise TypeError("not the scores and the protocol of an evaluation")
        return Stored(path, scores, content["protocol"], content["evaluated"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--against {where}: expected {path.name} and {PROTOCOL_FILE} of another evaluation ({error}); make them"
            " with python launch/evaluate.py RUN --out FOLDER"
        ) from None


def check_agreement(protocol: Protocol, stored: Stored) -> None:
    """Refuse to compare with scores of another protocol.

    Raises:
        UserError: names every key that differs, with both values.
    """
    mine = protocol.as_dict()
    differing = [name for name in {**mine, **stored.protocol} if mine.get(name) != stored.protocol.get(name)]
    if differing:
        said = "; ".join(_difference(name, mine.get(name), stored.protocol.get(name)) for name in differing)
        raise UserError(
            f"--against {stored.path}: was measured with another protocol, so the scores cannot be compared: {said};"
            " evaluate both with the same options and data"
        )


def _difference(name: str, here: Any, there: Any) -> str:
    if isinstance(here, list) and isinstance(there, list) and name in ("prompts", "images"):
        first = next((i for i, pair in enumerate(zip(here, there, strict=False)) if pair[0] != pair[1]), None)
        where = "one goes on" if first is None else f"number {first} is {here[first]!r} here, {there[first]!r} there"
        return f"{name}: {len(here)} here, {len(there)} there, {where}"
    return f"{name} = {_short(here)} here, {_short(there)} there"


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 40 else json.dumps(value)


def protocol_bytes(protocol: Protocol, evaluated: Evaluated) -> bytes:
    """The content of protocol.json."""
    content: Mapping[str, Any] = {"protocol": protocol.as_dict(), "evaluated": asdict(evaluated)}
    return (json.dumps(content, indent=1) + "\n").encode()
