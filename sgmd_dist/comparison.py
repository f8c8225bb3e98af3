"""A generator before and after distillation, scored against its teacher on the same prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgmd_dist.assemble import Which
from sgmd_dist.decode import decoder
from sgmd_dist.durable import write_durably
from sgmd_dist.evaluation import Scores, contact_sheet_gif, score
from sgmd_dist.models.base import LatentShape
from sgmd_dist.rollout import Network
from sgmd_dist.sampling import Prompts, Source, encode_prompts, sample_videos

REFERENCE_SEED, SAMPLE_SEED = 1, 2
ROWS_SHOWN = 6


@dataclass(frozen=True)
class Protocol:
    """What the scores were measured with; stored beside them."""

    captions: list[str]
    latent_shape: LatentShape
    teacher_steps: int
    student_steps: int
    sigma_shift: float
    guidance_scale: float
    which: Which
    reference_seed: int = REFERENCE_SEED
    sample_seed: int = SAMPLE_SEED


@dataclass
class Comparison:
    """Latents `[N, C, F, H, W]` of each column and their scores against the reference."""

    protocol: Protocol
    videos: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)

    def table(self) -> str:
        """The scores as text."""
        names = [field.name for field in fields(Scores)]
        rows = [f"{'':<9}" + "".join(f"{name:>14}" for name in names)]
        for column, scores in self.scores.items():
            rows.append(f"{column:<9}" + "".join(f"{getattr(scores, name):>14.3f}" for name in names))
        return "\n".join(rows)

    def write(self, folder: Path, source: Source) -> None:
        """Write scores.json, protocol.json and samples.gif into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        scores = {name: scores.as_dict() for name, scores in self.scores.items()}
        write_durably(folder / "scores.json", (json.dumps(scores, indent=1) + "\n").encode())
        facts = {**self.protocol.__dict__, "checkpoint": source.checkpoint.name}
        write_durably(folder / "protocol.json", (json.dumps(facts, indent=1) + "\n").encode())
        steps = self.protocol.student_steps
        titles = {
            "teacher": f"teacher, {self.protocol.teacher_steps} steps",
            "before": f"before, {steps} steps",
            "after": f"after, {steps} steps",
        }
        places = torch.linspace(0, len(self.protocol.captions) - 1, ROWS_SHOWN).long()
        contact_sheet_gif(
            folder / "samples.gif",
            {titles[name]: self.videos[name][places] for name in titles},
            decoder(source.pretrained),
            prompts=[self.protocol.captions[i] for i in places.tolist()],
        )


def compare(source: Source, protocol: Protocol, device: torch.device) -> Comparison:
    """Sample and score: `before` is the network that the generator started from, `after` the trained one, both with
    few steps and no guidance; `teacher` is the guided teacher from the same noise, with which it scores the floor: the
    reference is the guided teacher from other noise."""
    prompts = encode_prompts(source.recipe, protocol.captions)
    teacher = source.teacher(device)
    many = {"num_steps": protocol.teacher_steps, "guidance_scale": protocol.guidance_scale}
    few = {"num_steps": protocol.student_steps, "seed": protocol.sample_seed}
    columns = {
        "before": (source.beginning(device), few),
        "after": (source.network(protocol.which, device), few),
        "teacher": (teacher, {**many, "seed": protocol.sample_seed}),
    }
    reference = _videos(teacher, prompts, protocol, device, **many, seed=protocol.reference_seed)
    result = Comparison(protocol)
    for name, (network, settings) in columns.items():
        result.videos[name] = _videos(network, prompts, protocol, device, **settings)
        result.scores[name] = score(result.videos[name], reference)
    return result


def _videos(network: Network, prompts: Prompts, protocol: Protocol, device: torch.device, **settings: Any) -> Tensor:
    return sample_videos(network, prompts, protocol.latent_shape, shift=protocol.sigma_shift, device=device, **settings)
