"""Few-step sampling: launch/sample.py MODEL --prompts FILE_OR_TEXT [...] --out FOLDER

MODEL is a run (its newest checkpoint), a checkpoint, or a folder of diffusers: an export, or a pretrained pipeline or
transformer. Every prompt is sampled with every seed. Under torchrun the ranks share out the videos; a video depends on
its seed, its prompt and the prompt's number alone.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from sgmd_dist.errors import UserError, natural_int, positive_float, positive_int, reports_user_errors
from sgmd_dist.registry import MODELS, available


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="run, checkpoint, export, or another diffusers folder")
    parser.add_argument("--prompts", nargs="+", required=True, help="captions, or files (docs/sampling.md)")
    parser.add_argument("--image", type=Path, help="what image-to-video prompts without an image begin with")
    parser.add_argument("--out", type=Path, required=True, help="folder for the videos and videos.json")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--seeds", type=natural_int, nargs="+", default=[0], metavar="N", help="default: 0")
    several.add_argument("--num-seeds", type=positive_int, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--steps", type=positive_int, help="Euler steps; default: the recipe's student_steps")
    parser.add_argument("--shift", type=positive_float, help="time shift; default: the scheduler's, or the recipe's")
    parser.add_argument("--guidance-scale", type=positive_float, default=1.0, help="default 1.0: none")
    parser.add_argument("--ema", action="store_true", help="sample the moving average of the weights")
    parser.add_argument("--format", choices=["mp4", "gif", "png"], default="mp4")
    parser.add_argument("--fps", type=positive_int, default=16, help="frames per second")
    parser.add_argument("--sheet", choices=["gif", "png"], help="all videos in one picture: in motion, or the middle")
    parser.add_argument("--size", type=_size, metavar="FxHxW", help="frames, height, width; default: the recipe's")
    parser.add_argument("--pretrained", type=Path, help="folder with text encoder and VAE; default: the model's own")
    parser.add_argument("--recipe", type=Path, help="recipe of a folder that has none of its own")
    parser.add_argument(
        "--family", choices=available(MODELS), help="model family of a folder without recipe; default: wan"
    )
    args = parser.parse_args()

    from sgmd_dist.durable import check_writable
    from sgmd_dist.generators import Options, open_generator, write_videos
    from sgmd_dist.parallel.mesh import process_group
    from sgmd_dist.prompts import encode_together, read_prompts
    from sgmd_dist.video_folder import takes_of

    which = "generator.ema" if args.ema else "generator"
    options = Options(
        which,
        num_steps=args.steps,
        shift=args.shift,
        size=args.size,
        pretrained=args.pretrained,
        recipe=args.recipe,
        family=args.family,
    )
    check_writable(args.out, f"--out {args.out}")
    seeds = range(args.num_seeds) if args.num_seeds else list(dict.fromkeys(args.seeds))
    with process_group() as device:
        generator = open_generator(args.model, options)
        if args.image is not None and generator.model.image_input is None:
            raise UserError(f"--image {args.image}: {args.model} is a text-to-video model; leave out --image")
        prompts = encode_together(
            generator.encoders, lambda: read_prompts(args.prompts, args.image), device, "--prompts"
        )
        takes = takes_of(prompts.captions, seeds)
        write_videos(
            generator,
            prompts,
            takes,
            args.out,
            ending=args.format,
            frames_per_second=args.fps,
            guidance_scale=args.guidance_scale,
            sheet=args.sheet,
            device=device,
        )


def _size(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"[1-9]\d{0,6}x[1-9]\d{0,6}x[1-9]\d{0,6}", text):
        raise argparse.ArgumentTypeError(f"{text}: expected FRAMESxHEIGHTxWIDTH, as 81x480x832")
    frames, height, width = map(int, text.split("x"))
    return frames, height, width


if __name__ == "__main__":
    sys.exit(main())
