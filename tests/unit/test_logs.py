"""Log lines go to the rank's own file, and those of the main rank to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loguru import logger

from sgmd_dist.errors import UserError
from sgmd_dist.logs import setup_logging


@pytest.fixture(autouse=True)
def the_logger_afterwards() -> Iterator[None]:
    yield
    logger.remove()
    logger.configure(extra={})
    logger.add(sys.stderr)


def test_the_main_rank_shows_info_and_its_file_holds_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path / "run", 0)
    logger.debug("detail")
    logger.info("progress")
    shown = capsys.readouterr().err
    written = (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert "| rank 0 | progress" in shown and "detail" not in shown
    assert "| rank 0 | progress" in written and "| rank 0 | detail" in written


def test_other_ranks_show_warnings_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path, 3)
    logger.info("progress")
    logger.warning("trouble")
    shown = capsys.readouterr().err
    assert "progress" not in shown and "| rank 3 | trouble" in shown
    assert "progress" in (tmp_path / "logs" / "rank3.log").read_text()


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    for word in ("first", "second"):
        setup_logging(tmp_path, 0)
        logger.info(word)
    written = (tmp_path / "logs" / "rank0.log").read_text()
    assert written.index("first") < written.index("second")


def test_a_message_with_braces_and_tags_is_written_as_it_is(tmp_path: Path) -> None:
    setup_logging(tmp_path, 0)
    logger.info("{}: {}", "a", "<red>{x}</red>")
    assert "a: <red>{x}</red>" in (tmp_path / "logs" / "rank0.log").read_text()


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir = '.*/file': cannot be written .*; set run\.dir to another folder"):
        setup_logging(tmp_path / "file", 0)
