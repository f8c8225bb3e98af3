"""Make data: the synthetic video world as shards, the tiny text encoder of its captions; index and verify shards."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from sgmd_dist.errors import EXIT_DONE, EXIT_FOUND_MISTAKES, UserError, positive_int, reports_user_errors


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


def prepare_verify(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from sgmd_dist.data.verify import total_bytes, verify

    with tqdm(total=total_bytes(args.shards), unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        report = verify(args.shards, num_threads=args.threads, on_bytes=bar.update)
    for mistake in report.mistakes:
        print(mistake)
    buckets = ", ".join(f"{bucket} {count}" for bucket, count in sorted(report.samples.items())) or "none"
    size = f"{report.num_shards} shards, {report.num_bytes / 1e9:.3f} GB"
    print(f"{len(report.mistakes) or 'no'} mistakes in {size}; good samples by bucket: {buckets}")
    return EXIT_FOUND_MISTAKES if report.mistakes else EXIT_DONE


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser("verify", help="read shards whole and list everything that is wrong; exit code 1 then")
    parser.add_argument("shards", nargs="+", help="data sets' folders, tars, or brace patterns of tars")
    parser.add_argument("--threads", type=positive_int, default=len(os.sched_getaffinity(0)), help="shards at a time")
    parser.set_defaults(run=prepare_verify)


def prepare_index(args: argparse.Namespace) -> None:
    import braceexpand
    from tqdm import tqdm

    from sgmd_dist.data.index import consolidate, write_sidecars

    folders = [Path(entry) for entry in args.shards if not entry.endswith(".tar")]
    tars = [Path(path) for entry in args.shards if entry.endswith(".tar") for path in braceexpand.braceexpand(entry)]
    if missing := next((path for path in (*folders, *tars) if not path.exists()), None):
        raise UserError(f"{missing}: no such folder or shard; give folders of tars, or tars")
    for folder in folders:
        with tqdm(total=len(list(folder.glob("*.tar"))), unit="shard", desc=str(folder), disable=None) as bar:
            index = consolidate(folder, num_threads=args.threads, on_indexed=lambda _, bar=bar: bar.update())
        counts = ", ".join(f"{bucket} {(index.bucket == i).sum()}" for i, bucket in enumerate(index.buckets))
        print(f"{folder / 'index.json'}: {len(index.paths)} shards, {index.num_samples} samples by bucket: {counts}")
        _write_missing_negative_prompt(folder, index.embed_dim, args)
    if tars:
        with tqdm(total=len(tars), unit="shard", desc="index", disable=None) as bar:
            records = write_sidecars(tars, num_threads=args.threads, on_indexed=lambda _: bar.update())
        print(f"{len(records)} shards indexed, {sum(len(record.keys) for record in records)} samples")


def _write_missing_negative_prompt(folder: Path, embed_dim: int, args: argparse.Namespace) -> None:
    from sgmd_dist.data.encode import NEGATIVE_PROMPT, TextEncoder
    from sgmd_dist.data.foreign import read_negative_embeds
    from sgmd_dist.data.format import NEGATIVE_PROMPT_NAME, write_negative_prompt

    path = folder / NEGATIVE_PROMPT_NAME
    if path.exists():
        return
    if args.negative_prompt_from is not None:
        said = f"--negative-prompt-from {args.negative_prompt_from}"
        embeds = read_negative_embeds(args.negative_prompt_from)
    elif args.text_encoder is not None:
        encoder = TextEncoder.from_pretrained(args.text_encoder)
        said, embeds = f"--text-encoder {args.text_encoder}", encoder.encode([NEGATIVE_PROMPT])[0]
    else:
        print(f"{path}: missing, training needs it; call again with --negative-prompt-from or --text-encoder")
        return
    if embeds.shape[1] != embed_dim:
        raise UserError(f"{said}: is {embeds.shape[1]} wide, the shards' prompt_embeds {embed_dim}; take theirs")
    write_negative_prompt(folder, embeds)
    print(f"{path}: written")


def _add_index(commands: Any) -> None:
    parser = commands.add_parser("index", help="index shards that have no index: ours, FastGen's, rCM's")
    parser.add_argument("shards", nargs="+", help="folders of tars, or tars and brace patterns for sidecars alone")
    parser.add_argument("--threads", type=positive_int, default=len(os.sched_getaffinity(0)), help="shards at a time")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--negative-prompt-from",
        type=Path,
        help="data set's folder, or .npy or .pt file, to copy it from where missing",
    )
    prompt.add_argument("--text-encoder", type=Path, help="diffusers folder to encode the negative prompt with")
    parser.set_defaults(run=prepare_index)


@reports_user_errors
def main() -> int | None:
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
    _add_verify(commands)
    _add_index(commands)
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
