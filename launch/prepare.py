"""Make data: the synthetic video world as shards, and the tiny text encoder that its captions need."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sgmd_dist.errors import reports_user_errors


def prepare_world(args: argparse.Namespace) -> None:
    from sgmd_dist.data.encode import TextEncoder
    from sgmd_dist.data.world import World, write_world_shards

    encoder = TextEncoder.from_pretrained(args.text_encoder)
    write_world_shards(args.out, World(), encoder, num_samples=args.num_samples, seed=args.seed)
    print(f"{args.out}: {args.num_samples} videos of the moving-shapes world")


def prepare_text_encoder(args: argparse.Namespace) -> None:
    from sgmd_dist.data.encode import make_tiny_text_encoder
    from sgmd_dist.data.world import all_captions

    make_tiny_text_encoder(args.out, all_captions(), args.seed)
    print(f"{args.out}: tokenizer and text encoder of the moving-shapes world")


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    world = commands.add_parser("world", help="write the moving-shapes world as shards")
    world.add_argument("out", type=Path, help="folder for the shards")
    world.add_argument("--num-samples", type=int, default=4096)
    world.add_argument("--seed", type=int, default=0)
    world.add_argument("--text-encoder", type=Path, default=Path("recipes/tiny_wan"), help="diffusers folder")
    world.set_defaults(run=prepare_world)
    encoder = commands.add_parser("text-encoder", help="write the world's tiny tokenizer and text encoder")
    encoder.add_argument("out", type=Path, help="diffusers folder to write into")
    encoder.add_argument("--seed", type=int, default=0)
    encoder.set_defaults(run=prepare_text_encoder)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
