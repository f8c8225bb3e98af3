"""What a command ends with: its exit code, and one line on stderr for what a person can mend."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from sgmd_dist.errors import (
    EXIT_DONE,
    EXIT_PREEMPTED,
    EXIT_WRONG_INPUT,
    UserError,
    positive_float,
    positive_int,
    reports_user_errors,
)

ROOT = Path(__file__).parents[2]


def test_the_exit_codes_are_those_that_batch_scripts_rely_on() -> None:
    assert (EXIT_DONE, EXIT_WRONG_INPUT, EXIT_PREEMPTED) == (0, 2, 75)


@pytest.mark.parametrize("returned, code", [(None, 0), (0, 0), (75, 75), (2, 2)])
def test_a_command_ends_with_what_its_main_returns_and_none_means_done(returned: int | None, code: int) -> None:
    assert reports_user_errors(lambda: returned)() == code


def test_a_user_error_is_one_message_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    @reports_user_errors
    def main() -> int:
        raise UserError("recipe.yaml: run.steps = 0: expected an integer >= 1")

    assert main() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: recipe.yaml: run.steps = 0: expected an integer >= 1\n"


def test_lines_of_many_ranks_with_one_terminal_stay_apart() -> None:
    """A pipe takes a write below PIPE_BUF bytes whole, so a message with its newline is one, also unbuffered."""
    code = """
import os, sys
from sgmd_dist.errors import UserError, reports_user_errors

@reports_user_errors
def main():
    raise UserError("mend it")

class MarksWrites(type(sys.stderr.buffer)):
    def write(self, data):
        os.write(2, bytes(data) + b"|")
        return len(data)

sys.stderr = type(sys.stderr)(MarksWrites(2, "w", closefd=False), write_through=True)
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-u", "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.stderr == "error: mend it\n|"


def test_a_kind_of_user_error_counts_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    class Special(UserError):
        pass

    @reports_user_errors
    def main() -> None:
        raise Special("special")

    assert main() == 2
    assert capsys.readouterr().err == "error: special\n"


def test_a_bug_keeps_its_trace() -> None:
    @reports_user_errors
    def main() -> None:
        raise ValueError("only a bug can do this")

    with pytest.raises(ValueError, match="only a bug"):
        main()


def test_the_wrapped_main_keeps_its_name_and_documentation() -> None:
    def main() -> None:
        """Does it."""

    assert reports_user_errors(main).__name__ == "main"
    assert reports_user_errors(main).__doc__ == "Does it."


def test_a_process_ends_with_the_code_and_without_a_trace() -> None:
    code = """
import sys
from sgmd_dist.errors import UserError, reports_user_errors

@reports_user_errors
def main():
    raise UserError("mend it")

sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: mend it\n")


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_counts_on_the_command_line_are_integers_from_one_on(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected an integer >= 1"):
        positive_int(text)
    assert positive_int("3") == 3


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "many"])
def test_scales_on_the_command_line_are_positive_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number > 0"):
        positive_float(text)
    assert positive_float("0.5") == 0.5
