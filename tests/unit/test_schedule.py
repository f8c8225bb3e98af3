"""Numbers of a recipe that change over training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from sgmd_dist.schedule import NonNegative, Positive, Schedule, UnitInterval, constant

RAMP = {"schedule": "linear", "from": 0.2, "to": 1.0, "steps": 4, "start": 10}
COSINE = {"schedule": "cosine", "from": 1.0, "to": 0.0, "steps": 4}
PIECES = {"schedule": "piecewise", "points": [[0, 0.1], [10, 0.05], [20, 0.0]]}


def read(value: Any) -> Schedule:
    return Schedule.model_validate(value)


def at(value: Any, steps: list[int]) -> list[float]:
    schedule = read(value)
    return [schedule.at(step) for step in steps]


@pytest.mark.parametrize("written", [0.1, "0.1", "1e-1", constant(0.1)])
def test_a_number_is_constant(written: Any) -> None:
    assert at(written, [0, 1, 10**9]) == [0.1, 0.1, 0.1]


def test_yamls_1e_5_is_a_number_though_pyyaml_reads_a_string() -> None:
    value = yaml.safe_load("lr: 1e-5")["lr"]
    assert isinstance(value, str)
    assert read(value).at(0) == 1e-5


def test_linear_moves_during_its_steps_and_rests_before_and_after() -> None:
    assert at(RAMP, [0, 10, 11, 12, 14, 15, 1000]) == pytest.approx([0.2, 0.2, 0.4, 0.6, 1.0, 1.0, 1.0])


def test_cosine_is_flat_at_both_ends() -> None:
    half = math.sqrt(0.5)
    assert at(COSINE, [0, 1, 2, 3, 4, 9]) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2, 0, 0])


def test_piecewise_holds_each_value_from_its_step_on() -> None:
    assert at(PIECES, [0, 9, 10, 19, 20, 999]) == [0.1, 0.1, 0.05, 0.05, 0.0, 0.0]
    assert at({"schedule": "piecewise", "points": [[0, 3]]}, [0, 7]) == [3.0, 3.0]


@pytest.mark.parametrize("written", [0.1, RAMP, COSINE, PIECES])
def test_values_bound_the_schedule(written: Any) -> None:
    schedule = read(written)
    low, high = min(schedule.values()), max(schedule.values())
    assert all(low <= schedule.at(step) <= high for step in range(50))
    assert {low, high} <= {schedule.at(step) for step in range(50)}


@pytest.mark.parametrize("written", [0.1, 3, RAMP, {**RAMP, "start": 0}, COSINE, PIECES])
def test_round_trip_through_yaml(written: Any) -> None:
    schedule = read(written)
    dumped = yaml.safe_dump(schedule.model_dump(mode="json", by_alias=True))
    again = read(yaml.safe_load(dumped))
    assert again == schedule
    assert [again.at(step) for step in range(30)] == [schedule.at(step) for step in range(30)]


def test_dump_is_what_a_person_would_write() -> None:
    assert read(0.1).model_dump(mode="json") == 0.1
    assert read(RAMP).model_dump(mode="json") == RAMP
    assert read({**RAMP, "start": 0}).model_dump(mode="json") == {k: v for k, v in RAMP.items() if k != "start"}
    assert read(PIECES).model_dump(mode="json") == PIECES


def test_schedules_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        read(0.1).to = 0.2  # type: ignore[misc]


@pytest.mark.parametrize(
    "written, message",
    [
        ("fast", "expected a number or a schedule"),
        (True, "expected a number or a schedule such as"),
        (None, "expected a number or a schedule such as"),
        ([0.1, 0.2], "expected a number or a schedule such as"),
        ("nan", "finite number"),
        (float("inf"), "finite number"),
        ({**COSINE, "to": float("nan")}, "finite number"),
        ({}, "one of linear, cosine, piecewise"),
        ({"from": 0, "to": 1, "steps": 5}, "one of linear, cosine, piecewise"),
        ({**RAMP, "schedule": "lineer"}, "one of linear, cosine, piecewise"),
        ({"schedule": "linear", "from": 0, "to": 1}, "a linear schedule lacks 'steps'"),
        ({"schedule": "cosine", "steps": 3}, "a cosine schedule lacks 'from' and lacks 'to'"),
        ({**RAMP, "end": 3}, "a linear schedule does not know 'end'"),
        ({**RAMP, "points": [[0, 1]]}, "a linear schedule does not know 'points'"),
        ({**PIECES, "start": 3}, "a piecewise schedule does not know 'start'"),
        ({"schedule": "piecewise"}, "a piecewise schedule lacks 'points'"),
        ({"schedule": "piecewise", "points": []}, "begin at 0"),
        ({"schedule": "piecewise", "points": [[5, 1.0]]}, "begin at 0"),
        ({"schedule": "piecewise", "points": [[0, 1.0], [9, 2.0], [4, 3.0]]}, "begin at 0"),
        ({"schedule": "piecewise", "points": [[0, 1.0], [9, 2.0], [9, 3.0]]}, "begin at 0"),
        ({**RAMP, "steps": 0}, "greater than or equal to 1"),
        ({**RAMP, "start": -1}, "greater than or equal to 0"),
        ({**RAMP, "steps": 2.5}, "integer"),
        ({**RAMP, "from": "low"}, "number"),
        ({**RAMP, "from": True}, "true or false"),
    ],
)
def test_what_is_no_schedule_is_refused_with_a_reason(written: Any, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        read(written)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "kind, good, bad, message",
    [
        (NonNegative, 0.0, -1e-9, "expected a number >= 0, at every step"),
        (Positive, 1e-9, 0.0, "expected a number > 0, at every step"),
        (UnitInterval, 1.0, 1.001, "expected a number >= 0 and <= 1, at every step"),
        (UnitInterval, 0.0, -0.001, "expected a number >= 0 and <= 1, at every step"),
    ],
)
def test_bounds_hold_at_every_step(kind: Any, good: float, bad: float, message: str) -> None:
    adapter = TypeAdapter(kind)
    assert adapter.validate_python(good).at(0) == good
    wrong = [
        bad,
        {"schedule": "linear", "from": good, "to": bad, "steps": 5},
        {"schedule": "cosine", "from": bad, "to": good, "steps": 5},
        {"schedule": "piecewise", "points": [[0, good], [5, bad], [6, good]]},
    ]
    for written in wrong:
        with pytest.raises(ValidationError) as caught:
            adapter.validate_python(written)
        assert message in str(caught.value)
