"""Train a recipe: torchrun --nproc-per-node=N launch/train.py RECIPE [--check | --dry-run] [key.sub=value ...]

Look at what a run saved: python launch/train.py --inspect-checkpoint RUN_OR_CHECKPOINT
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sgmd_dist.errors import (
    EXIT_DONE,
    EXIT_WRONG_INPUT,
    UserError,
    natural_int,
    positive_int,
    reports_user_errors,
)
from sgmd_dist.preemption import profile_requests, stop_requests

if TYPE_CHECKING:
    from sgmd_dist.layout import Layout
    from sgmd_dist.recipe import Recipe


@reports_user_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override keys of the recipe")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="validate everything, print the plan and stop")
    mode.add_argument(
        "--dry-run", action="store_true", help="take two steps without weights, data and memory, compare ranks and stop"
    )
    mode.add_argument(
        "--inspect-checkpoint",
        type=Path,
        metavar="DIR",
        help="print what a checkpoint, or each of a run folder, holds, verify it and stop; takes no recipe",
    )
    parser.add_argument("--world-size", type=positive_int, help="number of ranks to --check or --dry-run for")
    parser.add_argument("--rank", type=natural_int, help="--dry-run as this rank alone, and compare none")
    args = parser.parse_intermixed_args()
    if args.inspect_checkpoint is not None:
        if args.recipe is not None or args.world_size is not None:
            parser.error("--inspect-checkpoint takes no recipe and no --world-size")
        return _inspect(args.inspect_checkpoint)
    if args.recipe is None:
        parser.error("the following arguments are required: recipe")
    if args.world_size and not (args.check or args.dry_run):
        parser.error("--world-size is for --check and --dry-run; torchrun decides how many train")
    if args.rank is not None and not args.dry_run:
        parser.error("--rank is for --dry-run")
    if args.dry_run:
        return _dry_run(args)
    if args.check:
        _planned(args)
        return EXIT_DONE
    with stop_requests(), profile_requests():  # imports take seconds, and large networks minutes to load: no signal
        # must be lost then, or end the process
        return _train(args)


def _planned(args: argparse.Namespace) -> tuple[Recipe, Layout]:
    """The recipe and its layout, checked, with the plan on the main rank's stdout."""
    from sgmd_dist import preflight
    from sgmd_dist.parallel.mesh import world_size
    from sgmd_dist.recipe_file import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    layout = recipe.layout(args.world_size or world_size())
    plan = preflight.check(recipe, layout)
    if _rank() == 0:
        print("\n".join(plan), flush=True)
    return recipe, layout


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _train(args: argparse.Namespace) -> int:
    from sgmd_dist.logs import setup_logging
    from sgmd_dist.parallel.lost_ranks import naming_lost_ranks, record_collectives
    from sgmd_dist.parallel.mesh import build_mesh, process_group
    from sgmd_dist.trainer import Trainer

    recipe, layout = _planned(args)
    run_dir, timeout_s = Path(recipe.run.dir), recipe.health.timeout
    setup_logging(run_dir, _rank())
    record_collectives(run_dir)
    with process_group(timeout_s) as device:
        trainer = None
        try:
            with naming_lost_ranks(run_dir, timeout_s):
                trainer = Trainer(recipe, build_mesh(layout, device))
                return trainer.fit()
        finally:
            if trainer is not None:
                trainer.close()
            del trainer


def _inspect(where: Path) -> int:
    """Print every checkpoint at `where`; the exit code says whether all are whole."""
    from sgmd_dist.checkpoint import inspect

    found = inspect(where)
    print("\n".join(inspection.text() for inspection in found))
    return EXIT_DONE if all(inspection.wrong is None for inspection in found) else EXIT_WRONG_INPUT


def _dry_run(args: argparse.Namespace) -> int:
    from sgmd_dist import dryrun
    from sgmd_dist.parallel.mesh import world_size
    from sgmd_dist.recipe_file import load_recipe

    size = args.world_size or world_size()
    planned = dryrun.planned_bytes(load_recipe(args.recipe, args.overrides), size)  # says what is wrong with the recipe
    if args.rank is not None and args.rank >= size:
        raise UserError(f"--rank {args.rank}: there are {size} ranks; give one from 0 to {size - 1}, or --world-size")
    ranks = dryrun.chosen_ranks(size) if args.rank is None else [args.rank]
    traces = dryrun.dry_run(args.recipe, args.overrides, size, ranks)
    dryrun.check_equal(traces)
    print("\n".join(dryrun.report(traces, size, planned)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
