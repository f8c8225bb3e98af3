"""Videos for VBench, and VBench itself where it is installed.

    FOLDER/videos/{prompt}-{index}.mp4   nothing else: VBench takes the first file's ending for that of all
    FOLDER/prompts.json                  file name -> prompt, where the name cannot be the prompt
    FOLDER/protocol.json                 what the videos were made with
    FOLDER/results/                      VBench's own

VBench (https://github.com/Vchitect/VBench, read at version 0.1.5) finds the videos of its own prompts by their exact
names, and takes other prompts from the file names or from a JSON file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sgmd_dist.assemble import Which
from sgmd_dist.decode import decoder, write_video
from sgmd_dist.durable import check_writable, write_durably
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import LatentShape
from sgmd_dist.prompts import Prompt, encode, encoders_of
from sgmd_dist.protocol import PROTOCOL_FILE, SAMPLE_SEED, Evaluated
from sgmd_dist.sampling import Source
from sgmd_dist.shares import Clock, Settings, sample_batches, shared_batches

# What VBench scores without more facts about a prompt than its words.
ANY_PROMPT = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
_MODULE = "vbench.launch.evaluate"  # its command `vbench evaluate` breaks at spaces in paths
_LAUNCHER_SETS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LONGEST_NAME = 255  # bytes, on Linux's file systems


@dataclass(frozen=True)
class Videos:
    """The videos to be made: `per_prompt` of each prompt, of noise (seed, number of the video)."""

    prompts: list[str]
    per_prompt: int
    latent_shape: LatentShape
    num_steps: int
    sigma_shift: float
    seed: int = SAMPLE_SEED

    @property
    def names(self) -> list[str]:
        """The file name of every video, all prompts' first ones first."""
        stems = file_stems(self.prompts)
        return [f"{stem}-{index}.mp4" for index in range(self.per_prompt) for stem in stems]


def file_stems(prompts: Sequence[str]) -> list[str]:
    """Names for prompts: the prompt itself, as VBench looks for it, where a file can have that name.

    A slash becomes an underscore, and a name that is too long is cut; either gets a digest, so that different prompts
    keep different names.
    """
    return [_stem(prompt) for prompt in prompts]


def _stem(prompt: str) -> str:
    safe = prompt.replace("/", "_").replace("\0", "_")
    room = _LONGEST_NAME - len("-0000.mp4")
    if safe == prompt and len(prompt.encode()) <= room:
        return prompt
    end = f"_{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
    return safe.encode()[: room - len(end)].decode(errors="ignore") + end


def make_videos(
    folder: Path, videos: Videos, which: Which, source: Source, device: torch.device, batch_size: int
) -> int:
    """Sample what `folder`, made by `prepare`, lacks of this rank's share; returns how many videos that was."""
    encoders = encoders_of(source.recipe, source.model, "--vbench")
    encoded = encode(encoders, [Prompt(prompt) for prompt in videos.prompts], device, "--vbench")
    prompts = encoded.repeated(videos.per_prompt)
    into, names = folder / "videos", videos.names
    batches = [
        batch
        for batch in shared_batches(len(names), batch_size)
        if not all((into / names[number]).exists() for number in batch)
    ]
    if not batches:
        return 0
    settings = Settings(videos.num_steps, videos.sigma_shift, videos.seed)
    to_rgb = decoder(source.pretrained, device)
    frames_per_second = 16 if source.pretrained is not None and (source.pretrained / "vae").is_dir() else 8
    network = source.network(which, device)
    aside = folder / f"rank{dist.get_rank()}.mp4"
    parts = sample_batches(network, prompts, videos.latent_shape, batches, settings, device, Clock())
    for numbers, latents in parts:
        for number, video in zip(numbers, latents, strict=True):
            write_video(aside, to_rgb(video.to(device)), frames_per_second)
            os.replace(aside, into / names[number])
    return sum(map(len, batches))


def prepare(folder: Path, videos: Videos, evaluated: Evaluated) -> None:
    """Make the folder with its descriptions, or find it made with the same settings.

    Raises:
        UserError: it holds videos of other settings or cannot be written, or two prompts are the same.
    """
    check_writable(folder, f"--vbench {folder}")
    if len(set(videos.prompts)) < len(videos.prompts):
        raise UserError("--prompts: a prompt occurs twice, and VBench knows prompts by their names; name each once")
    content: dict[str, Any] = json.loads(json.dumps({"videos": asdict(videos), "evaluated": asdict(evaluated)}))
    path = folder / PROTOCOL_FILE
    known = _read(path) if path.exists() else content
    if _makes_the_videos(known) != _makes_the_videos(content):
        raise UserError(
            f"--vbench {folder}: holds videos of other weights, prompts or settings (see {path}); name a new folder"
        )
    prompts = dict(zip(videos.names, videos.prompts * videos.per_prompt, strict=True))
    try:
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        write_durably(folder / "prompts.json", (json.dumps(prompts, indent=1, ensure_ascii=False) + "\n").encode())
        write_durably(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"--vbench {folder}: cannot be written ({error}); name another folder") from None


def _read(path: Path) -> dict[str, Any]:
    """A protocol.json, or nothing where it cannot be read as one."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and isinstance(known.get("evaluated", {}), dict) else {}


def _makes_the_videos(content: dict[str, Any]) -> list[Any]:
    """What of protocol.json decides on the videos."""
    evaluated = content.get("evaluated", {})
    return [content.get("videos"), evaluated.get("checkpoint_sha256"), evaluated.get("which")]


def find_python() -> str | None:
    """The interpreter that has VBench: this one, or that of the command `vbench` in PATH; None where there is none.

    VBench 0.1.5 wants other versions of numpy and transformers than this project, so it mostly has its own.
    """
    if importlib.util.find_spec("vbench") is not None:
        return sys.executable
    found = shutil.which("vbench")
    if found is None:
        return None
    with open(found, "rb") as script:
        head = script.read(512).decode(errors="replace")
    named = re.search(r"[^\s\"'!]*python[\d.]*", head)  # its first line, or pip's second where the path is long
    return None if named is None else shutil.which(named[0])


def command(python: str, folder: Path, dimensions: Sequence[str], is_standard: bool) -> list[str]:
    """The call that scores the folder's videos.

    Args:
        is_standard: the prompts are VBench's own; otherwise it is told the prompts.
    """
    mode = ["--mode", "vbench_standard"] if is_standard else ["--mode", "custom_input"]
    told = [] if is_standard else ["--prompt_file", str(folder / "prompts.json")]
    places = ["--videos_path", str(folder / "videos"), "--output_path", str(folder / "results")]
    return [python, "-m", _MODULE, "--dimension", *dimensions, *places, *mode, *told]


def run(call: Sequence[str]) -> None:
    """Run VBench.

    Raises:
        UserError: it failed; what it printed says why.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_SETS}
    code = subprocess.run(call, env=environment, check=False).returncode
    if code:
        raise UserError(f"VBench ended with exit code {code}, its output is above; the call was {shlex.join(call)}")
