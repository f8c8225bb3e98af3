"""Benchmarks: launch/bench.py kernels|attention [--models NAME ...] [--dtype DTYPE] [--out FILE.json]
            launch/bench.py step RECIPE [key.sub=value ...] [--steps N] [--out FILE.json]
            launch/bench.py checkpoint [--millions N | --recipe RECIPE] [--dir FOLDER] [--out FILE.json]
            launch/bench.py data [--samples N] [--rounds N] [--threads N] [--dir FOLDER] [--out FILE.json]
            launch/bench.py science [--quick | --smoke | --acceptance] [--world NAME ...] [--methods NAME ...]

Kernels and attention: on CUDA each is timed against eager torch, torch.compile and what the card reaches in the same
run; elsewhere it is checked for correctness on small shapes. Exit code 1: a result was wrong.

Step holds optimizer steps against the network passes that they are made of, checkpoint says what synchronous and
asynchronous saves cost training: both in one process or under torchrun. Data holds the stream and plain webdataset
against a raw read of the same bytes. Science trains every method in small worlds whose truth is known.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sgmd_dist.durable import check_writable, check_writable_file
from sgmd_dist.errors import positive_float, positive_int, reports_user_errors

if TYPE_CHECKING:
    from sgmd_dist.benchmarks.checkpoint import Report as CheckpointReport
    from sgmd_dist.benchmarks.data import Report as DataReport
    from sgmd_dist.benchmarks.report import Report
    from sgmd_dist.benchmarks.step import StepReport

TINY_RECIPE = Path(__file__).parents[1] / "recipes/tiny_sgmd.yaml"
DTYPES = ("bfloat16", "float16", "float32")


@reports_user_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="kernels|attention|step|checkpoint|data|science"
    )
    _add_operations(commands)
    _add_step(commands)
    _add_checkpoint(commands)
    _add_data(commands)
    _add_science(commands)
    args, rest = parser.parse_known_args()  # overrides may stand behind options
    if rest and (args.command != "step" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "step":
        args.overrides += rest
    if args.out is not None:
        check = check_writable if args.command == "science" else check_writable_file
        check(args.out, f"--out {args.out}")
    return args.run(args)


def _add_operations(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for name, description in (
        ("kernels", "the fused operations: AdaLN, gated residual, norm with rotary embedding, SGMD's outer loss"),
        ("attention", "the attention backends, self and cross"),
    ):
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument("--models", nargs="+", metavar="NAME", help="shapes of these models; default: all")
        command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the activations")
        command.add_argument("--repeats", type=int, default=20, help="timed runs of which the median is taken")
        command.add_argument("--out", type=Path, help="write the results as JSON")
        command.set_defaults(run=_operations)


def _add_step(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    description = "a recipe's optimizer steps over their bare network passes"
    command = commands.add_parser("step", help=description, description=description)
    command.add_argument("recipe", help="YAML file")
    command.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override keys of the recipe")
    command.add_argument("--steps", type=positive_int, default=10, help="measured steps, after two unmeasured ones")
    command.add_argument("--out", type=Path, help="write the results as JSON")
    command.set_defaults(run=_step)


def _add_checkpoint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    description = "stall, time and rate of synchronous and asynchronous saves of two networks with their optimizers"
    command = commands.add_parser("checkpoint", help=description, description=description)
    size = command.add_mutually_exclusive_group()
    size.add_argument("--millions", type=positive_float, default=100.0, help="random Wans of so many parameters")
    size.add_argument("--recipe", help="the networks that this recipe trains, instead")
    command.add_argument("--dir", type=Path, default=Path("runs"), help="folder on the disk to measure; default: runs")
    command.add_argument("--repeats", type=positive_int, default=3, help="saves of each kind; medians are taken")
    command.add_argument("--out", type=Path, help="write the results as JSON")
    command.set_defaults(run=_checkpoint)


def _add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    description = "CPU time and rate of the stream and of plain webdataset over a raw read of the same bytes"
    command = commands.add_parser("data", help=description, description=description)
    command.add_argument("--samples", type=positive_int, default=96, help="samples of 8.39 MB, written first")
    command.add_argument("--text-tokens", type=positive_int, default=512, help="that each holds, padded to 512")
    command.add_argument("--rounds", type=positive_int, default=15, help="over all samples; minima are taken")
    command.add_argument("--threads", type=positive_int, default=2, help="of the stream")
    command.add_argument("--workers", type=int, default=0, help="also webdataset in so many worker processes")
    command.add_argument("--dir", type=Path, help="keep the shards there, or measure those there; default: temporary")
    command.add_argument("--smoke", action="store_true", help="a few kilobytes: tries the benchmark, measures nothing")
    command.add_argument("--out", "--json", type=Path, help="write the results as JSON")
    command.set_defaults(run=_data)


def _add_science(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    description = "what objectives reach for how many network passes, in small worlds with known teachers"
    command = commands.add_parser("science", help=description, description=description)
    size = command.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="all worlds and methods, a few steps each: tries everything")
    size.add_argument("--smoke", action="store_true", help="SGMD against DMD2 in the world of trajectories, with gates")
    size.add_argument("--acceptance", action="store_true", help="the same in the world of the tiny Wan, on three seeds")
    command.add_argument("--world", nargs="+", metavar="NAME", help="ring, trajectories, tiny_wan; default: all")
    command.add_argument("--methods", nargs="+", metavar="NAME", help="names of table rows; default: all")
    command.add_argument("--seeds", type=positive_int, default=4, help="trainings of each method; default: 4")
    command.add_argument(
        "--passes", type=positive_int, help="network passes per sample; default: 8000, 2000 in tiny_wan"
    )
    command.add_argument("--workers", type=positive_int, default=2, help="processes, one thread each; default: 2")
    command.add_argument(
        "--out", type=Path, help="folder of results, and of finished trainings; default: runs/science, or none"
    )
    command.set_defaults(run=_science)


def _operations(args: argparse.Namespace) -> int:
    import torch

    from sgmd_dist.benchmarks import attention, kernels
    from sgmd_dist.benchmarks.shapes import select

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    benchmark = {"kernels": kernels, "attention": attention}[args.command]
    models, dtype = select(args.models, device), getattr(torch, args.dtype)
    report = benchmark.run(models, dtype, device, args.repeats, timed=device.type == "cuda")
    print(report.table())
    _write(report, args.out)
    return 0 if report.correct else 1


def _step(args: argparse.Namespace) -> int:
    from sgmd_dist.benchmarks import step
    from sgmd_dist.recipe_file import load_recipe

    report = step.run(load_recipe(args.recipe, args.overrides), args.steps)
    if int(os.environ.get("RANK", "0")) == 0:
        print(report.table(), flush=True)
        _write(report, args.out)
    return 0


def _checkpoint(args: argparse.Namespace) -> int:
    from sgmd_dist.benchmarks import checkpoint
    from sgmd_dist.parallel.mesh import build_mesh, process_group, world_size
    from sgmd_dist.recipe_file import load_recipe

    ranks = world_size()
    if args.recipe is None:
        batch = ["data.micro_batch_size=1", f"data.global_batch_size={ranks}"]
        recipe = load_recipe(TINY_RECIPE, [*checkpoint.random_wan(args.millions), *batch])
    else:
        recipe = load_recipe(args.recipe)
    with process_group() as device:
        mesh = build_mesh(recipe.layout(ranks), device)
        report = checkpoint.run(recipe, mesh, args.dir / "bench_checkpoint", args.repeats)
        if mesh.is_main:
            print(report.table(), flush=True)
            _write(report, args.out)
    return 0


def _data(args: argparse.Namespace) -> int:
    from sgmd_dist.benchmarks import data

    with tempfile.TemporaryDirectory(prefix="bench_data_") as temporary:
        report = data.run(
            args.dir or Path(temporary),
            num_samples=min(args.samples, 8) if args.smoke else args.samples,
            rounds=min(args.rounds, 2) if args.smoke else args.rounds,
            threads=args.threads,
            workers=args.workers,
            text_tokens=min(args.text_tokens, 8) if args.smoke else args.text_tokens,
            small=args.smoke,
        )
    print(report.table())
    _write(report, args.out)
    return 0


def _write(report: Report | StepReport | CheckpointReport | DataReport, path: Path | None) -> None:
    if path is not None:
        report.write(path)
        print(path)


def _science(args: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of torch in this process
    from sgmd_dist.benchmarks.science import study
    from sgmd_dist.benchmarks.science.report import Report

    if args.smoke or args.acceptance:
        return _science_gates(args)
    folder = args.out or (None if args.quick else Path("runs/science"))
    worlds = study.known(args.world, study.WORLDS, "--world")
    if args.quick:
        studies = [study.quick_study(world, args.seeds, args.methods) for world in worlds]
    else:
        studies = [study.full_study(world, args.seeds, args.methods, args.passes) for world in worlds]
    report = Report(" ".join(["launch/bench.py", *sys.argv[1:]]))
    for each in studies:
        report.curves[each.world] = each.run(args.workers, folder)
    print(report.tables())
    if folder is not None:
        report.write(folder)
        print(f"results.json, tables.md and curves in {folder}")
    return 0


def _science_gates(args: argparse.Namespace) -> int:
    from sgmd_dist.benchmarks.science import gates
    from sgmd_dist.benchmarks.science.report import Report

    if args.smoke:
        verdict = gates.smoke(args.workers)
    else:
        curves, verdict = gates.acceptance(args.workers, args.out or Path("runs/science"))
        print(Report("", curves).tables(), end="\n\n")
    print(verdict.table())
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    sys.exit(main())
