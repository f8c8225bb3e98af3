"""What stands beside an export's weights: a card that says how to use them and what they came from, and the recipe.

OUT/README.md
OUT/recipe.yaml
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import __version__ as diffusers_version

from sgmd_dist import __version__, checkpoint, flow
from sgmd_dist.adapters import Lora
from sgmd_dist.assemble import Which
from sgmd_dist.errors import UserError
from sgmd_dist.sampling import Source

SCORES_FILE = "scores.json"  # of a run folder: scores by rows, {"before": {"swd": 0.2, ...}, ...}
_PROTOCOL_FILE = "protocol.json"
_NAMES = "with the names of the model's first release"


@dataclass(frozen=True)
class Origin:
    """What an export is made from.

    Attributes:
        recipe: its resolved YAML.
        facts: lines of the card's table, name and value.
        pretrained: the pipeline that a pipeline's other parts are copied from.
        chain: number of steps and time shift that the weights were trained for; None where they are no few-step
            generator's.
        scores: text on the run's last evaluation.
        size: of the videos, as arguments of diffusers' pipelines; empty where the recipe does not say it.
    """

    recipe: str
    facts: Mapping[str, str]
    pretrained: Path | None
    chain: tuple[int, float] | None = None
    scores: str = ""
    size: Mapping[str, int] = field(default_factory=dict)


def origin_of(source: Source, which: Which, more: Mapping[str, str]) -> Origin:
    """What a checkpoint tells of its weights, with the scores of the run's last evaluation.

    Args:
        more: further facts.

    Raises:
        UserError: the run's scores cannot be read.
    """
    meta, recipe = checkpoint.read_meta(source.checkpoint), source.recipe
    facts = {
        "run": recipe.run.name,
        "objective": recipe.objective.name,
        "step": str(meta.step),
        "weights": which,
        "began from": str(recipe.model.for_role("generator").pretrained),
        "teacher": str(recipe.model.for_role("teacher").pretrained),
        "data": str(recipe.data.shards),
        "data (SHA-256 of the index)": str(meta.stream.get("index_sha256")),
        "trained with": ", ".join(f"{name} {version}" for name, version in meta.versions.items()),
        "exported with": f"sgmd_dist {__version__}, torch {torch.__version__}, diffusers {diffusers_version}",
        **more,
    }
    chain = source.few_steps if "student_steps" in recipe.objective.model_dump() else None
    text = (source.checkpoint / checkpoint.RECIPE_FILE).read_text(encoding="utf-8")
    size = {} if recipe.data.video is None else recipe.data.video.model_dump()
    return Origin(text, facts, source.pretrained, chain, _scores(source.checkpoint.parents[1]), size)


def card(origin: Origin, title: str, use: str, kind: str = "text") -> dict[str, str]:
    """The card and the recipe, by file name.

    Args:
        use: how the export is used, code indented.
        kind: "text" or "image": what a video is made from.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in origin.facts.items())
    text = f"""---
library_name: diffusers
tags: [{kind}-to-video, distillation, sgmd]
---
# {title}, made with sgmd_dist

{use}

| | |
|---|---|
{rows}

{origin.scores}`recipe.yaml` holds every key of the training.
"""
    return {"README.md": text, "recipe.yaml": origin.recipe}


def network_card(origin: Origin, *, original: bool) -> dict[str, str]:
    """The card of a transformer's export; `original`: by the names of the model's first release."""
    if original:
        what = f"One file for each network, {_NAMES}: for ComfyUI's folder `models/diffusion_models`."
    else:
        what = "A transformer's folder for diffusers' `from_pretrained`; of a pair of experts, one folder for each."
    return card(origin, "A video transformer", f"{what}\n\n{_sampling(origin)}")


def adapter_card(origin: Origin, lora: Lora, *, original: bool) -> dict[str, str]:
    """The card of a LoRA; `original`: by the names of the model's first release."""
    if original:
        what = f"One file for each network, {_NAMES}: for ComfyUI's folder `models/loras`, and for diffusers."
    else:
        what = 'For diffusers\' `pipe.load_lora_weights("THIS FOLDER")`; of a pair of experts, one folder for each.'
    what = f"{what}\nIt hangs on the weights that the training began from."
    return card(origin, f"A LoRA of rank {lora.rank}", f"{what}\n\n{_sampling(origin)}")


def sigmas(chain: tuple[int, float]) -> str:
    """The noise levels at which a chain runs the network, as text."""
    return ", ".join(f"{sigma:.4g}" for sigma in flow.sampling_sigmas(*chain)[:-1])


def _sampling(origin: Origin) -> str:
    if origin.chain is None:
        return "It is no few-step generator: it is sampled as its pretrained model is."
    return (
        f"It makes a video in {origin.chain[0]} Euler steps, at sigma {sigmas(origin.chain)}, without guidance\n"
        "(`guidance_scale=1.0`, cfg 1)."
    )


def _scores(run_dir: Path) -> str:
    """A table of a run's last evaluation; empty where there was none."""
    path = run_dir / SCORES_FILE
    if not path.is_file():
        return ""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = {name: _numbers(scores) for name, scores in found.items() if isinstance(scores, dict)}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); evaluate the run again, or remove the file") from None
    names = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    if not names:
        return ""
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for row, scores in rows.items():
        if scores:
            cells = (f"{scores[name]:.3f}" if name in scores else "" for name in names)
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join([f"Scores of the run's last evaluation{_evaluated(run_dir)}:", "", *lines, "", ""])


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items() if type(value) in (int, float)}


def _evaluated(run_dir: Path) -> str:
    """Which weights were evaluated, where that was written down."""
    try:
        protocol = json.loads((run_dir / _PROTOCOL_FILE).read_text(encoding="utf-8"))
        evaluated = protocol.get("evaluated", protocol)
        return f", of {evaluated['which']} in {evaluated['checkpoint']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
