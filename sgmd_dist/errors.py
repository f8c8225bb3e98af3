"""Errors that a person made and a person mends, and the exit codes that scripts rely on."""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from fractions import Fraction

EXIT_DONE = 0
EXIT_FOUND_MISTAKES = 1  # what the command was to check is wrong; it has said everything that is
EXIT_WRONG_INPUT = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved and willing to continue; a batch script requeues on it


class UserError(ValueError):
    """A wrong recipe, shard, checkpoint or launch.

    The message is one line that names the file, the key and its value, says what was expected and how to
    mend it. Commands print it and exit with code 2 instead of showing a traceback.
    """


def describe(error: BaseException) -> str:
    """The kind of an exception and the first sentence of its message: torch goes on with advice that is none here."""
    return f"{type(error).__name__} {' '.join(str(error).split()).partition('. ')[0]}".strip()


def reports_user_errors(main: Callable[[], int | None]) -> Callable[[], int]:
    """Wrap a command's `main`: print a `UserError` as one message on stderr and return exit code 2."""

    @functools.wraps(main)
    def wrapped() -> int:
        try:
            return main() or EXIT_DONE
        except UserError as error:
            # One write: ranks share a terminal, and under torchrun (python -u) print would write the newline apart.
            sys.stderr.write(f"error: {error}\n")
            sys.stderr.flush()
            return EXIT_WRONG_INPUT

    return wrapped


def positive_int(text: str) -> int:
    """An argument of a command: an integer >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected an integer >= 1")
    return int(text)


def natural_int(text: str) -> int:
    """An argument of a command: an integer >= 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected an integer >= 0")
    return int(text)


def positive_float(text: str) -> float:
    """An argument of a command: a finite number > 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number > 0")
    return number


def positive_fraction(text: str) -> Fraction:
    """An argument of a command: a number or a fraction > 0, as 16 or 30000/1001."""
    try:
        number = Fraction(text)
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number > 0, as 16 or 30000/1001")
    return number
