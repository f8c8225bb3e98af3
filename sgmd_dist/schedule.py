"""Numbers that change over training: a constant, or a linear, cosine or piecewise function of the step."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_serializer, model_validator
from pydantic_core import PydanticCustomError

_EXAMPLE = "{schedule: linear, from: 0.0, to: 0.1, steps: 500}"
EXPECTED = f"a number or a schedule such as {_EXAMPLE}"
_NEEDED = {"linear": {"from", "to", "steps"}, "cosine": {"from", "to", "steps"}, "piecewise": {"points"}}
_ALLOWED = {"linear": {"start"}, "cosine": {"start"}, "piecewise": set()}


class Schedule(BaseModel):
    """A recipe's number, written as `0.1`, as a ramp or as points.

    `{schedule: linear|cosine, from: 0.0, to: 0.1, steps: 500, start: 0}` moves from `from` to `to` during
    `steps` steps beginning at step `start`, and is constant before and after.
    `{schedule: piecewise, points: [[0, 0.1], [1000, 0.05]]}` holds each value from its step on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schedule: Literal["constant", "linear", "cosine", "piecewise"]
    from_: float = Field(default=0.0, alias="from")
    to: float = 0.0
    start: int = Field(default=0, ge=0)
    steps: int = Field(default=1, ge=1)
    points: tuple[tuple[int, float], ...] = Field(
        default=(), description="pairs of a step and a number, as in [[0, 0.1], [1000, 0.05]]"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, data: Any) -> Any:
        if isinstance(data, Schedule):
            return data
        if isinstance(data, dict):
            return cls._checked(data)
        if isinstance(data, bool) or not isinstance(data, int | float | str):
            raise _wrong(f"expected {EXPECTED}")
        try:
            return {"schedule": "constant", "to": float(data)}
        except ValueError:
            raise _wrong(f"expected {EXPECTED}") from None

    @classmethod
    def _checked(cls, data: dict[str, Any]) -> dict[str, Any]:
        kind = data.get("schedule")
        if not isinstance(kind, str) or kind not in _NEEDED:
            raise _wrong(f"expected 'schedule' to be one of {', '.join(_NEEDED)}, as in {_EXAMPLE}")
        missing = sorted(_NEEDED[kind] - set(data))
        extra = sorted(str(key) for key in set(data) - _NEEDED[kind] - _ALLOWED[kind] - {"schedule"})
        if missing or extra:
            wrong = [f"lacks '{key}'" for key in missing] + [f"does not know '{key}'" for key in extra]
            known = ", ".join(sorted(_NEEDED[kind] | _ALLOWED[kind]))
            raise _wrong(f"a {kind} schedule {' and '.join(wrong)}; its keys: {known}")
        if any(isinstance(value, bool) for value in data.values()):
            raise _wrong("expected numbers, found true or false")
        return data

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        steps = [step for step, _ in self.points]
        if self.schedule == "piecewise" and (not steps or steps[0] != 0 or steps != sorted(set(steps))):
            raise _wrong("expected points whose steps increase and begin at 0, as in [[0, 0.1], [1000, 0.05]]")
        if not all(math.isfinite(v) for v in self.values()):
            raise _wrong("expected a finite number")
        return self

    @model_serializer
    def _compact(self) -> Any:
        if self.schedule == "constant":
            return self.to
        if self.schedule == "piecewise":
            return {"schedule": self.schedule, "points": [list(point) for point in self.points]}
        ramp = {"schedule": self.schedule, "from": self.from_, "to": self.to, "steps": self.steps}
        return {**ramp, "start": self.start} if self.start else ramp

    def values(self) -> tuple[float, ...]:
        """The numbers that bound the schedule: it never leaves their range."""
        if self.schedule == "piecewise":
            return tuple(value for _, value in self.points)
        return (self.to,) if self.schedule == "constant" else (self.from_, self.to)

    def at(self, step: int) -> float:
        """The value at optimizer step `step` (counted from 0)."""
        if self.schedule == "constant":
            return self.to
        if self.schedule == "piecewise":
            return [value for first, value in self.points if first <= step][-1]
        progress = min(max((step - self.start) / self.steps, 0.0), 1.0)
        if self.schedule == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.from_ + (self.to - self.from_) * progress


def constant(value: float) -> Schedule:
    """A schedule that never changes."""
    return Schedule.model_validate(value)


def scheduled(*, ge: float | None = None, gt: float | None = None, le: float | None = None) -> AfterValidator:
    """Bounds for every value that a schedule can take."""

    def check(schedule: Schedule) -> Schedule:
        for value in schedule.values():
            if ge is not None and value < ge or gt is not None and value <= gt or le is not None and value > le:
                bounds = [f"{sign} {b:g}" for sign, b in ((">=", ge), (">", gt), ("<=", le)) if b is not None]
                raise _wrong(f"expected a number {' and '.join(bounds)}, at every step")
        return schedule

    return AfterValidator(check)


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("schedule", "{message}", {"message": message})


NonNegative = Annotated[Schedule, scheduled(ge=0.0)]
Positive = Annotated[Schedule, scheduled(gt=0.0)]
AtLeastOne = Annotated[Schedule, scheduled(ge=1.0)]
UnitInterval = Annotated[Schedule, scheduled(ge=0.0, le=1.0)]
