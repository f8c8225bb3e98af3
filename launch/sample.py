"""Few-step sampling: launch/sample.py RUN_OR_CHECKPOINT --prompts FILE_OR_TEXT [...] --out FOLDER"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sgmd_dist.errors import positive_float, positive_int, reports_user_errors


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="run folder (its newest checkpoint) or checkpoint folder")
    parser.add_argument("--prompts", nargs="+", required=True, help="captions, or files with one caption per line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the videos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=positive_int, help="Euler steps; default: the recipe's student_steps")
    parser.add_argument("--shift", type=positive_float, help="time shift; default: the recipe's sigma_shift")
    parser.add_argument("--guidance-scale", type=positive_float, default=1.0, help="default 1.0: none")
    parser.add_argument("--ema", action="store_true", help="sample the moving average of the weights")
    parser.add_argument("--format", choices=["mp4", "gif", "png"], default="mp4")
    parser.add_argument("--fps", type=positive_int, default=16, help="frames per second")
    args = parser.parse_args()

    import torch

    from sgmd_dist.data.sources import latent_shape_of
    from sgmd_dist.decode import decoder, write_video
    from sgmd_dist.sampling import encode_prompts, open_source, read_captions, sample_videos

    source = open_source(args.model)
    num_steps, shift = (args.steps, args.shift) if args.steps and args.shift else source.few_steps
    prompts = encode_prompts(source.recipe, read_captions(args.prompts))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    videos = sample_videos(
        source.network("generator.ema" if args.ema else "generator", device),
        prompts,
        latent_shape_of(source.recipe, source.model),
        num_steps=args.steps or num_steps,
        shift=args.shift or shift,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        device=device,
    )
    to_rgb = decoder(source.pretrained, device)
    for number, (caption, latents) in enumerate(zip(prompts.captions, videos, strict=True)):
        path = args.out / f"{number:04d}.{args.format}"
        write_video(path, to_rgb(latents), args.fps)
        print(f"{path}: {caption}")


if __name__ == "__main__":
    sys.exit(main())
