"""Score a distilled generator against its teacher and real videos: launch/evaluate.py RUN_OR_CHECKPOINT

Writes scores.json, protocol.json, samples.gif, samples.mp4 and report.html into the output folder, prints the tables.
With --vbench FOLDER it writes videos as VBench expects them, and runs VBench where it is installed, instead.
Under torchrun the ranks share out the videos; each holds one whole network at a time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sgmd_dist.errors import UserError, positive_int, reports_user_errors

if TYPE_CHECKING:
    import torch

    from sgmd_dist.data.real import RealVideos
    from sgmd_dist.models.base import LatentShape
    from sgmd_dist.prompts import Prompt
    from sgmd_dist.protocol import Protocol, Stored
    from sgmd_dist.sampling import Source


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="run folder (its newest checkpoint) or checkpoint folder")
    parser.add_argument("--out", type=Path, help="output folder; default: the run folder, or the checkpoint's run")
    parser.add_argument("--prompts", type=Path, help="file of prompts; default: all captions of the run's world")
    parser.add_argument("--repeats", type=positive_int, default=6, help="videos per caption")
    parser.add_argument("--teacher-steps", type=positive_int, default=20, help="Euler steps of the teacher")
    parser.add_argument("--ema", action="store_true", help="score the moving average of the weights")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="videos at a time on a rank")
    parser.add_argument("--real", metavar="SHARDS", help="real videos; none: leave them out; default: data.shards")
    parser.add_argument("--against", type=Path, help="scores.json of another evaluation with the same protocol")
    parser.add_argument("--vbench", type=Path, metavar="FOLDER", help="make VBench's videos, and run it, instead")
    parser.add_argument("--vbench-videos", type=positive_int, default=5, help="videos per caption for VBench")
    parser.add_argument("--vbench-dimensions", nargs="+", metavar="NAME", help="default: those for any prompt")
    parser.add_argument("--vbench-standard", action="store_true", help="the prompts are VBench's own")
    args = parser.parse_args()
    _refuse(args)

    from sgmd_dist.parallel.mesh import process_group

    with process_group() as device:
        if args.vbench is None:
            _evaluate(args, device)
            return
        is_main = _make_vbench(args, device)
    if is_main:
        _run_vbench(args)  # with the device's memory free


def _refuse(args: argparse.Namespace) -> None:
    """Options that say nothing of what is asked for."""
    scoring = {"--real": args.real, "--against": args.against}
    judging = {"--vbench-dimensions": args.vbench_dimensions, "--vbench-standard": args.vbench_standard or None}
    wrong = [name for name, value in (scoring if args.vbench else judging).items() if value is not None]
    if wrong and args.vbench:
        raise UserError(f"--vbench, {', '.join(wrong)}: VBench's videos are made instead of the scores; leave out one")
    if wrong:
        raise UserError(f"{', '.join(wrong)}: is for VBench's videos; add --vbench FOLDER, or leave it out")


def _evaluate(args: argparse.Namespace, device: torch.device) -> None:
    import torch.distributed as dist

    from sgmd_dist import comparison, evaluation_files
    from sgmd_dist.checkpoint import together
    from sgmd_dist.data.sources import latent_shape_of
    from sgmd_dist.durable import check_writable
    from sgmd_dist.protocol import evaluated_of, read_stored
    from sgmd_dist.sampling import open_source

    source, which = open_source(args.model), "generator.ema" if args.ema else "generator"
    is_main, num_ranks = dist.get_rank() == 0, dist.get_world_size()
    out = args.out or source.checkpoint.parents[1]
    against = None if args.against is None else read_stored(args.against)
    shape, real = latent_shape_of(source.recipe, source.model), []

    def prepare() -> tuple[Protocol, list[Prompt]] | None:
        """What is measured, before a network is loaded; it is the main rank that reads."""
        if not is_main:
            return None
        source.few_steps  # noqa: B018  # refuses what trains no generator before data are opened
        check_writable(out, f"--out {out}")
        real.extend(_real_videos(args.real, source, shape))
        return _protocol(args, source, shape, real, against)

    prepared = together(prepare)[0]
    assert prepared is not None
    protocol, prompts = prepared
    count = len(protocol.captions)
    if is_main:
        print(f"{source.checkpoint}: {count} videos per row, teacher with {args.teacher_steps} steps", flush=True)
    latents = real[0].latents(protocol.num_real) if real else None
    found = comparison.compare(source, protocol, prompts, which, device, real=latents, batch_size=args.batch_size)
    if not is_main:
        return
    scores = found.scores if against is None else comparison.side_by_side(found.scores, against.scores)
    print(comparison.table(scores, comparison.DETAILS))
    print(comparison.table(scores, comparison.HEADLINE), flush=True)
    evaluated = evaluated_of(source, which, device, num_ranks, args.batch_size)
    evaluation_files.write(out, found, evaluated, source, device, against)
    print(" ".join(f"{out}/{name}" for name in evaluation_files.NAMES))


def _make_vbench(args: argparse.Namespace, device: torch.device) -> bool:
    """Make the videos; returns whether this is the rank that goes on."""
    import torch.distributed as dist

    from sgmd_dist import vbench
    from sgmd_dist.checkpoint import together
    from sgmd_dist.data.sources import latent_shape_of
    from sgmd_dist.prompts import prompts_of
    from sgmd_dist.protocol import evaluated_of
    from sgmd_dist.sampling import open_source

    source, which = open_source(args.model), "generator.ema" if args.ema else "generator"
    is_main, num_ranks = dist.get_rank() == 0, dist.get_world_size()
    if source.model.image_input is not None:
        raise UserError(
            f"--vbench {args.vbench}: VBench's videos are of captions alone, and {source.checkpoint} is of an"
            " image-to-video model; score it without --vbench"
        )
    prompts, shape = prompts_of(source.recipe, source.model, args.prompts), latent_shape_of(source.recipe, source.model)
    videos = vbench.Videos([prompt.caption for prompt in prompts], args.vbench_videos, shape, *source.few_steps)
    evaluated = evaluated_of(source, which, device, num_ranks, args.batch_size)
    together(lambda: vbench.prepare(args.vbench, videos, evaluated) if is_main else None)
    made = sum(together(lambda: vbench.make_videos(args.vbench, videos, which, source, device, args.batch_size)))
    if is_main:
        print(f"{args.vbench}/videos: {len(videos.names)} videos, {made} of them new", flush=True)
    return is_main


def _run_vbench(args: argparse.Namespace) -> None:
    import shlex

    from sgmd_dist import vbench

    python = vbench.find_python()
    dimensions = args.vbench_dimensions or vbench.ANY_PROMPT
    call = vbench.command(python or "python", args.vbench, dimensions, args.vbench_standard)
    if python is None:
        print(f"VBench is not installed. In an environment that has it (pip install vbench), run:\n{shlex.join(call)}")
    else:
        vbench.run(call)


def _real_videos(shards: str | None, source: Source, shape: LatentShape) -> list[RealVideos]:
    """One set or none: shards that were named must hold real videos, those of the training may."""
    from sgmd_dist.data.real import open_real

    if shards == "none":
        return []
    try:
        return [open_real(source.recipe, source.model, shards, shape)]
    except UserError as error:
        if shards is not None:
            raise
        print(f"no real videos to compare with: {error}", flush=True)
        return []


def _protocol(
    args: argparse.Namespace, source: Source, shape: LatentShape, real: list[RealVideos], against: Stored | None
) -> tuple[Protocol, list[Prompt]]:
    from sgmd_dist.prompts import check_prompts, prompts_of
    from sgmd_dist.protocol import check_agreement, protocol_of

    prompts = prompts_of(source.recipe, source.model, args.prompts)
    check_prompts(prompts, source.model, "--prompts")
    protocol = protocol_of(
        source,
        prompts,
        args.repeats,
        shape,
        args.teacher_steps,
        real=real[0].fingerprint if real else None,
        num_real=min(real[0].num_videos, len(prompts) * args.repeats) if real else 0,
    )
    if against is not None:
        check_agreement(protocol, against)
    return protocol, prompts


if __name__ == "__main__":
    sys.exit(main())
