"""Alarms go on where a logged number stays far above where it was, and stand after a resume as without one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from loguru import logger

from sgmd_dist.alarms import WATCHED, Alarm, Alarms, Rise
from sgmd_dist.watch_sections import AlarmsSection

PROMPT = AlarmsSection(residual=2.0, gap=2.0, grad_norm=2.0, window=1, warmup=0, patience=2)
NUMBERS = {watched.metric: 1.0 for watched in WATCHED.values()}


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What is logged as a warning in the test."""
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(line.strip()), format="{message}", level="WARNING")
    yield lines
    logger.remove(sink)


def rises(values: list[float], window: int = 3, warmup: int = 0) -> list[float]:
    rise = Rise(window, warmup)
    return [rise.add(value) for value in values]


def test_a_rise_is_the_median_of_the_last_values_over_the_lowest_such_median() -> None:
    assert rises([4, 2, 3, 2, 1, 9, 8, 4]) == [1, 1, 1, 1, 1, 1, 4, 4]


def test_a_single_outlier_and_a_falling_series_are_no_rise() -> None:
    assert max(rises([1, 1, 1, 100, 1, 1, 1])) == 1
    assert max(rises([9, 8, 7, 6, 5, 4, 3])) == 1


def test_a_slow_rise_is_seen_as_a_sudden_one() -> None:
    slow = [1.02**step for step in range(200)]
    assert rises(slow)[-1] == pytest.approx(1.02**197)


def test_values_of_the_warm_up_do_not_count() -> None:
    assert rises([0.001] * 4 + [1] * 5, warmup=4)[-1] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_an_infinite_rise_and_no_later_reference(value: float) -> None:
    found = rises([value] * 3 + [1, 1, 1, 2, 2, 2])
    assert found[2] == math.inf and found[-1] == 2


def test_a_number_that_was_zero_has_no_rise() -> None:
    assert rises([0, 0, 0, 5, 5, 5])[-1] == 1


def test_an_alarm_goes_on_after_so_many_values_in_a_row_and_once_an_episode() -> None:
    alarm = Alarm(2.0, window=1, warmup=0, patience=3)
    values = [1, 3, 3, 1, 3, 3, 3, 3, 1, 3, 3, 3]
    assert [index for index, value in enumerate(values) if alarm.add(value)] == [6, 11]
    assert alarm.is_on and not alarm.add(2) and not alarm.is_on, "exactly the bound is not beyond it"


def test_each_number_has_its_alarm_and_its_metric(warnings: list[str]) -> None:
    for name, watched in WATCHED.items():
        alarms = Alarms(PROMPT, [NUMBERS] * 3)
        for step in (40, 50, 60):
            found = alarms.look(step, NUMBERS | {watched.metric: 2.5})
        assert found == {f"health/alarm/{other}": float(other == name) for other in WATCHED}
        assert not alarms.ends_run
        assert warnings.pop().startswith(
            f"step 50: {watched.metric} is 2.50 times its lowest, beyond health.alarms' 2:"
        )
        assert not warnings


def test_alarms_stand_after_a_resume_as_without_an_interruption(warnings: list[str]) -> None:
    """A resumed run warns neither again of what it warned of, nor later than it would have."""
    high = NUMBERS | {"fake_score/residual": 9.0}
    assert Alarms(PROMPT, [NUMBERS, high]).look(30, high)["health/alarm/residual"] == 1 and len(warnings) == 1
    resumed = Alarms(PROMPT, [NUMBERS, high, high])
    assert resumed.look(40, high)["health/alarm/residual"] == 1 and len(warnings) == 1


def test_stop_ends_the_run_where_an_alarm_goes_on_and_lets_it_continue_by_the_same_command(warnings: list[str]) -> None:
    section, high = PROMPT.model_copy(update={"stop": True}), NUMBERS | {"generator/grad_norm": math.nan}
    alarms = Alarms(section, [NUMBERS, high])
    assert not alarms.ends_run
    alarms.look(3, high)
    assert alarms.ends_run and warnings[0].endswith("; this ends the training")
    resumed = Alarms(section, [NUMBERS, high, high])
    resumed.look(4, high)
    assert not resumed.ends_run


def test_numbers_that_an_objective_does_not_log_have_no_alarm() -> None:
    assert Alarms(PROMPT, []).look(1, {"generator/grad_norm": 1.0}) == {"health/alarm/generator_grad_norm": 0.0}


def test_null_switches_one_or_all_off() -> None:
    assert Alarms(None, [NUMBERS]).look(1, NUMBERS) == {}
    without = Alarms(PROMPT.model_copy(update={"grad_norm": None}), [])
    assert list(without.look(1, NUMBERS)) == ["health/alarm/residual", "health/alarm/gap"]
