"""Log lines: INFO of the main rank on stderr, every rank's own file in the run folder."""

from __future__ import annotations

import sys
from pathlib import Path

from loguru import logger
from tqdm import tqdm

from sgmd_dist.errors import UserError

_FORMAT = "{time:HH:mm:ss} | {level: <7} | rank {extra[rank]} | {message}"


def setup_logging(run_dir: Path, rank: int) -> None:
    """Send this process's log to `run_dir`/logs/rank<N>.log, and the main rank's to stderr above the bar.

    Raises:
        UserError: `run_dir` cannot be written.
    """
    logger.remove()
    logger.configure(extra={"rank": rank})
    try:
        logger.add(run_dir / "logs" / f"rank{rank}.log", format=_FORMAT, level="DEBUG", enqueue=False)
    except OSError as error:
        raise UserError(f"run.dir = '{run_dir}': cannot be written ({error}); set run.dir to another folder") from None
    level = "INFO" if rank == 0 else "WARNING"
    logger.add(lambda line: tqdm.write(line, end="", file=sys.stderr), format=_FORMAT, level=level, colorize=False)
