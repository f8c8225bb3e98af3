"""Plan a run: launch/plan.py RECIPE --nodes N --gpus-per-node M --gpu-memory GIB [key.sub=value ...]

Prints bytes, FLOPs, communication and seconds of a step on a GPU, and whether it fits; where it does not, what would
make it fit. Takes no GPU and no weights: where the pretrained folder is not there, model.config describes it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sgmd_dist.errors import natural_int, positive_float, positive_int, reports_user_errors


@reports_user_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override keys of the recipe")
    parser.add_argument("--nodes", type=positive_int, default=1, help="default: 1")
    parser.add_argument("--gpus-per-node", type=positive_int, default=8, help="default: 8")
    parser.add_argument("--gpu-memory", type=positive_float, default=80.0, metavar="GIB", help="of a GPU; default: 80")
    parser.add_argument("--peak-tflops", type=positive_float, default=989.0, help="dense, of a GPU; default: an H100's")
    parser.add_argument("--mfu", type=_share, default=0.4, help="share of the peak that passes reach; default: 0.4")
    parser.add_argument(
        "--bandwidth",
        type=_two_numbers,
        default=(300.0, 40.0),
        metavar="INTRA/INTER",
        help="GB/s that a GPU sends inside a node and across nodes; default: 300/40",
    )
    parser.add_argument(
        "--step", type=natural_int, default=0, help="optimizer step to plan, where schedules change; default: 0"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    args = parser.parse_intermixed_args()

    from sgmd_dist.durable import check_writable_file
    from sgmd_dist.planner.advice import advise
    from sgmd_dist.planner.machine import Machine
    from sgmd_dist.planner.plan import make_plan
    from sgmd_dist.planner.report import table, write_json
    from sgmd_dist.recipe_file import load_recipe

    if args.json is not None:
        check_writable_file(args.json, f"--json {args.json}")
    recipe = load_recipe(args.recipe, args.overrides)
    intra, inter = args.bandwidth
    machine = Machine(args.nodes, args.gpus_per_node, args.gpu_memory, args.peak_tflops, args.mfu, intra, inter)
    plan = make_plan(recipe, machine, args.step)
    advice = None if plan.fits else advise(recipe, machine, args.step)
    print(table(plan, advice))
    if args.json is not None:
        write_json(plan, advice, args.json)
        print(args.json)
    return 0


def _share(text: str) -> float:
    if (number := positive_float(text)) > 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number in (0, 1]")
    return number


def _two_numbers(text: str) -> tuple[float, float]:
    first, slash, second = text.partition("/")
    if not slash:
        raise argparse.ArgumentTypeError(f"{text}: expected two numbers, as in 300/40")
    return positive_float(first), positive_float(second)


if __name__ == "__main__":
    sys.exit(main())
