"""The recipe's section of videos that a run makes while it trains."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from sgmd_dist.section import Section, wrong


class SamplesSection(Section):
    """Videos of fixed prompts and seeds while training, in `run.dir`/samples: at the start, every `every` steps and at
    the end, by the generator's few steps, and by those of its moving average (`ema`). `prompts`: a file with one
    caption per line, a .jsonl file of captions with images, or a list of captions. `teacher` adds, once, the guided
    teacher's in `teacher_steps`.

    seeds: of the noise; each prompt is sampled with each.
    formats, frames_per_second: of the files.
    """

    every: int = Field(default=250, ge=1)
    prompts: str | list[str] = Field(
        description="a file with one caption per line or, .jsonl, with images, or a list of captions"
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(
        default=[0], min_length=1, description="a list of integers >= 0, as in [0, 1]"
    )
    ema: bool = True
    teacher: bool = False
    teacher_steps: int = Field(default=30, ge=1)
    formats: list[Literal["mp4", "gif"]] = Field(
        default=["mp4"], min_length=1, description="a list of mp4 and gif, as in [mp4]"
    )
    frames_per_second: int = Field(default=16, ge=1, le=240)

    @field_validator("prompts")
    @classmethod
    def _some_prompts(cls, prompts: str | list[str]) -> str | list[str]:
        listed = [prompts] if isinstance(prompts, str) else prompts
        if not listed or not all(caption.strip() for caption in listed):
            raise PydanticCustomError("empty", "empty")
        return prompts

    @field_validator("seeds", "formats")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) != len(values):
            raise wrong(f"{values}: expected each once")
        return values
