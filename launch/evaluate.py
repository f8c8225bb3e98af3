"""Score a distilled generator against its teacher: launch/evaluate.py RUN_OR_CHECKPOINT

Writes scores.json, protocol.json and samples.gif into the output folder and prints the table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sgmd_dist.errors import reports_user_errors


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="run folder (its newest checkpoint) or checkpoint folder")
    parser.add_argument("--out", type=Path, help="output folder; default: the run folder, or the checkpoint's run")
    parser.add_argument("--prompts", type=Path, help="one caption per line; default: all captions of the run's world")
    parser.add_argument("--repeats", type=int, default=6, help="videos per caption")
    parser.add_argument("--teacher-steps", type=int, default=30, help="Euler steps of the teacher")
    parser.add_argument("--raw", action="store_true", help="score the raw weights instead of their moving average")
    args = parser.parse_args()

    import torch

    from sgmd_dist.comparison import Protocol, compare
    from sgmd_dist.data.sources import captions_of, latent_shape_of
    from sgmd_dist.sampling import open_source

    source = open_source(args.model)
    objective = source.recipe.objective
    captions = captions_of(source.recipe, args.prompts) * args.repeats
    protocol = Protocol(
        captions=captions,
        latent_shape=latent_shape_of(source.recipe, source.model),
        teacher_steps=args.teacher_steps,
        student_steps=objective.student_steps,
        sigma_shift=objective.sigma_shift,
        guidance_scale=objective.guidance_scale.at(source.recipe.run.steps),
        which="generator" if args.raw else "generator.ema",
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    comparison = compare(source, protocol, device)
    out = args.out or source.checkpoint.parents[1]
    comparison.write(out, source)
    print(comparison.table())
    print(f"{source.checkpoint}: scores and pictures are in {out}/scores.json and {out}/samples.gif")


if __name__ == "__main__":
    sys.exit(main())
