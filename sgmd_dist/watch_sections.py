"""The recipe's sections on watching a run: where numbers go, what is profiled, and what is to raise an alarm."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from sgmd_dist.section import Section, wrong


class WandbSection(Section):
    """A run on Weights & Biases, as the arguments of `wandb.init`; its name is `run.name`, its config the recipe.

    project, entity: whose the run is; without an entity your own.
    group, tags: to find it by.
    mode: `offline` writes into `run.dir` alone, for `wandb sync`.
    """

    project: str = "sgmd_dist"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = Field(default=[])
    mode: Literal["online", "offline"] = "online"


class ProfileSection(Section):
    """What torch's profiler records into `run.dir`/profile: the optimizer steps [first, last] of `steps`, counted from
    1, on `ranks`, and after `kill -USR2` of any rank the next `signal_steps` of that rank.
    """

    steps: tuple[int, int] | None = Field(
        default=None, description="the first and the last step, counted from 1, as in [10, 12], or null"
    )
    ranks: list[Annotated[int, Field(ge=0)]] = Field(
        default=[0], min_length=1, description="numbers of ranks, from 0, as in [0, 3]"
    )
    signal_steps: int = Field(default=2, ge=1)

    @field_validator("steps")
    @classmethod
    def _in_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise wrong("expected the first and the last step, counted from 1, as in [10, 12], or null")
        return steps


class LoggingSection(Section):
    """Where metrics go beside metrics.jsonl and the progress bar, and what is profiled. `wandb: null` reports to no
    Weights & Biases. `profile`: what torch's profiler records.
    """

    tensorboard: bool = True
    wandb: WandbSection | None = None
    profile: ProfileSection = ProfileSection()


class MotionSection(Section):
    """Every `every` steps `samples` videos of the generator are held against the guided teacher's of the same prompts
    and noise, by their latent motion and their colours. A warning is logged where the motion is out of [`lowest`,
    `highest`] times the teacher's, or where the values of some latent channel have drifted by more than `max_drift` of
    the teacher's standard deviation; with `stop` the run saves and ends there, and counts as done. The teacher's videos
    take `teacher_steps` and are made once.
    """

    every: int = Field(default=100, ge=1)
    samples: int = Field(default=16, ge=1)
    teacher_steps: int = Field(default=30, ge=1)
    lowest: float = Field(default=0.5, ge=0, le=1)
    highest: float = Field(default=1.2, ge=1)
    max_drift: float = Field(default=0.5, gt=0)
    stop: bool = False


class AlarmsSection(Section):
    """Warnings where the fake score's tracking `residual`, the teacher-fake `gap` or a role's `grad_norm` rises: its
    median over `window` log lines is more than so many times the lowest such median so far, in `patience` lines in a
    row; null for none. The first `warmup` log lines of the run do not count. With `stop` the run saves and ends there,
    and counts as done.
    """

    residual: float | None = Field(default=2.5, gt=1)
    gap: float | None = Field(default=2.0, gt=1)
    grad_norm: float | None = Field(default=5.0, gt=1)
    window: int = Field(default=5, ge=1)
    warmup: int = Field(default=5, ge=0)
    patience: int = Field(default=3, ge=1)
    stop: bool = False


class HealthSection(Section):
    """What is watched beside the losses, and what follows. An update whose gradients are not finite is skipped on all
    ranks; after `max_skipped` of a role in a row the run goes back to its last checkpoint, with new noise, at most
    `rollbacks` times. A collective that some rank has not joined after `timeout` seconds ends the run, and the log
    names that rank. `motion: null` watches no samples, `alarms: null` no logged numbers.
    """

    max_skipped: int = Field(default=20, ge=1)
    rollbacks: int = Field(default=3, ge=0)
    timeout: float = Field(default=1800.0, gt=0)
    motion: MotionSection | None = None
    alarms: AlarmsSection | None = AlarmsSection()
