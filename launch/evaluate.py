"""Score a distilled generator against its teacher: launch/evaluate.py RUN_OR_CHECKPOINT

Writes scores.json, protocol.json and samples.gif into the output folder and prints the table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sgmd_dist.errors import positive_int, reports_user_errors


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="run folder (its newest checkpoint) or checkpoint folder")
    parser.add_argument("--out", type=Path, help="output folder; default: the run folder, or the checkpoint's run")
    parser.add_argument("--prompts", type=Path, help="one caption per line; default: all captions of the run's world")
    parser.add_argument("--repeats", type=positive_int, default=6, help="videos per caption")
    parser.add_argument("--teacher-steps", type=positive_int, default=20, help="Euler steps of the teacher")
    parser.add_argument("--ema", action="store_true", help="score the moving average of the weights")
    args = parser.parse_args()

    import torch

    from sgmd_dist.comparison import Protocol, compare
    from sgmd_dist.data.sources import captions_of, latent_shape_of
    from sgmd_dist.sampling import open_source

    source = open_source(args.model)
    student_steps, sigma_shift = source.few_steps
    captions = captions_of(source.recipe, args.prompts) * args.repeats
    protocol = Protocol(
        captions=captions,
        latent_shape=latent_shape_of(source.recipe, source.model),
        teacher_steps=args.teacher_steps,
        student_steps=student_steps,
        sigma_shift=sigma_shift,
        guidance_scale=source.recipe.objective.guidance_scale.at(source.recipe.run.steps),
        which="generator.ema" if args.ema else "generator",
    )
    print(f"{source.checkpoint}: {len(captions)} videos per row, teacher with {args.teacher_steps} steps", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    comparison = compare(source, protocol, device)
    out = args.out or source.checkpoint.parents[1]
    comparison.write(out, source)
    print(comparison.table())
    print(f"{out}/scores.json {out}/samples.gif")


if __name__ == "__main__":
    sys.exit(main())
