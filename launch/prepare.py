"""Make data: videos with captions, or captions alone, as shards; pairs of noise and a teacher's sample; the synthetic
video world, and its tiny text encoder. Index and verify shards.

    torchrun --nproc-per-node=N launch/prepare.py videos MANIFEST|FOLDER OUT --pretrained DIR --buckets 81x480x832,...
    torchrun --nproc-per-node=N launch/prepare.py prompts FILE OUT --pretrained DIR --video 81 480 832
    torchrun --nproc-per-node=N launch/prepare.py pairs RECIPE OUT --samples 10000 [key.sub=value ...]

One process or many do `videos`, `prompts` and `pairs`. The same command, on any number of ranks, continues what was
killed. Exit code 75: stopped by SIGTERM or SIGUSR1, with whole shards.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgmd_dist.errors import (
    EXIT_DONE,
    EXIT_FOUND_MISTAKES,
    EXIT_PREEMPTED,
    UserError,
    positive_float,
    positive_fraction,
    positive_int,
    reports_user_errors,
)

if TYPE_CHECKING:
    import torch

    from sgmd_dist.data.manifest import Row
    from sgmd_dist.data.preparation import RowEncoder, Summary

DTYPES = ("bfloat16", "float32")


def prepare_videos(args: argparse.Namespace) -> int:
    import torch

    from sgmd_dist.data.manifest import read_videos
    from sgmd_dist.data.row_encoders import VideoRows, fingerprint, image_settings, pretrained_fingerprint
    from sgmd_dist.data.video import parse_buckets

    buckets, manifest = parse_buckets(args.buckets), read_videos(args.source, args.split)
    settings = {
        "rows_sha256": fingerprint(manifest.rows),
        "pretrained_sha256": pretrained_fingerprint(args.pretrained, ("vae", "text_encoder", "tokenizer")),
        "buckets": sorted(bucket.name for bucket in buckets),
        "fps": str(args.fps),
        "vae_dtype": args.vae_dtype,
        **image_settings(args.pretrained),
        **_text_settings(args),
    }

    def load(device: torch.device) -> RowEncoder:
        return VideoRows.load(
            manifest,
            args.pretrained,
            buckets,
            frames_per_second=args.fps,
            negative_prompt=args.negative_prompt,
            captions_at_once=args.text_batch,
            device=device,
            text_dtype=getattr(torch, args.text_dtype),
            vae_dtype=getattr(torch, args.vae_dtype),
            max_tokens=args.max_tokens,
        )

    return _prepare(args, manifest.rows, settings, load)


def prepare_prompts(args: argparse.Namespace) -> int:
    import torch

    from sgmd_dist.data.encode import TextEncoder
    from sgmd_dist.data.manifest import read_captions
    from sgmd_dist.data.row_encoders import (
        CaptionRows,
        fingerprint,
        pretrained_fingerprint,
        text_encoding_of,
        transformer_latents,
    )
    from sgmd_dist.data.video import Bucket

    rows = read_captions(args.source, args.split)
    said = f"--video {' '.join(map(str, args.video))}"
    latent_shape = transformer_latents(args.pretrained, Bucket(*args.video), said)
    settings = {
        "rows_sha256": fingerprint(rows),
        "pretrained_sha256": pretrained_fingerprint(args.pretrained, ("text_encoder", "tokenizer")),
        "latent_shape": list(latent_shape),
        **_text_settings(args),
    }

    def load(device: torch.device) -> RowEncoder:
        text_encoder = TextEncoder.from_pretrained(
            args.pretrained,
            getattr(torch, args.text_dtype),
            device=device,
            max_tokens=args.max_tokens,
            encoding=text_encoding_of(args.pretrained),
        )
        return CaptionRows(
            text_encoder, latent_shape, negative_prompt=args.negative_prompt, captions_at_once=args.text_batch
        )

    return _prepare(args, rows, settings, load)


def _text_settings(args: argparse.Namespace) -> dict[str, Any]:
    from sgmd_dist.data.row_encoders import text_settings

    named = {"text_dtype": args.text_dtype, "max_tokens": args.max_tokens, "negative_prompt": args.negative_prompt}
    return {**named, **text_settings(args.pretrained)}


def _prepare(
    args: argparse.Namespace, rows: list[Row], settings: dict[str, Any], load: Callable[[torch.device], RowEncoder]
) -> int:
    from sgmd_dist.data.preparation import prepare
    from sgmd_dist.parallel.mesh import process_group
    from sgmd_dist.preemption import stop_requests

    with process_group() as device, stop_requests() as stop:
        summary = prepare(
            args.out,
            rows,
            settings,
            load(device),
            shard_bytes=int(args.shard_megabytes * 2**20),
            retry_skipped=args.retry_skipped,
            stop=stop,
        )
    return _told(args.out, summary)


def _told(out: Path, summary: Summary) -> int:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{out}: {summary.text()}", flush=True)
    return EXIT_PREEMPTED if summary.stopped else EXIT_DONE


def prepare_pairs(args: argparse.Namespace) -> int:
    from sgmd_dist.pairs import chain_of, make_pairs
    from sgmd_dist.parallel.mesh import build_mesh, process_group, world_size
    from sgmd_dist.preemption import stop_requests
    from sgmd_dist.recipe_file import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    chain, layout = chain_of(recipe, args.steps), recipe.layout(world_size())
    with process_group() as device, stop_requests() as stop:
        summary = make_pairs(
            recipe,
            build_mesh(layout, device),
            args.out,
            chain,
            num_pairs=args.samples,
            shard_bytes=int(args.shard_megabytes * 2**20),
            retry_skipped=args.retry_skipped,
            stop=stop,
        )
    return _told(args.out, summary)


def prepare_world(args: argparse.Namespace) -> None:
    from sgmd_dist.data.encode import TextEncoder
    from sgmd_dist.data.world import World, write_world_shards

    encoder = TextEncoder.from_pretrained(args.text_encoder)
    write_world_shards(args.out, World(), encoder, num_samples=args.num_samples, seed=args.seed)
    print(f"{args.out}: {args.num_samples} videos of the moving-shapes world")


def prepare_world_videos(args: argparse.Namespace) -> None:
    from sgmd_dist.data.world import World
    from sgmd_dist.data.world_videos import world_video, write_world_pipeline
    from sgmd_dist.decode import write_video

    clips, pipeline = args.out / "clips", args.out / "pipeline"
    samples = [World().sample(0, number) for number in range(args.num_samples)]
    for number, sample in enumerate(samples):
        write_video(clips / f"{number:06d}.mp4", world_video(sample.latents))
        (clips / f"{number:06d}.txt").write_text(f"{sample.caption}\n", encoding="utf-8")
    captions = "\n".join(dict.fromkeys(sample.caption for sample in samples))
    (args.out / "prompts.txt").write_text(f"{captions}\n", encoding="utf-8")
    write_world_pipeline(pipeline, Path("recipes/tiny_wan"))
    print(f"{clips}: {args.num_samples} videos with captions\n{pipeline}: a pipeline for them")


def prepare_text_encoder(args: argparse.Namespace) -> None:
    from sgmd_dist.data.encode import make_tiny_text_encoder
    from sgmd_dist.data.world import all_captions
    from sgmd_dist.durable import check_writable

    check_writable(args.out, f"OUT = {args.out}")
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
    from sgmd_dist.data.negative_prompt import write_where_missing

    folders = [Path(entry) for entry in args.shards if not entry.endswith(".tar")]
    tars = [Path(path) for entry in args.shards if entry.endswith(".tar") for path in braceexpand.braceexpand(entry)]
    if missing := next((path for path in (*folders, *tars) if not path.exists()), None):
        raise UserError(f"{missing}: no such folder or shard; give folders of tars, or tars")
    for folder in folders:
        with tqdm(total=len(list(folder.glob("*.tar"))), unit="shard", desc=str(folder), disable=None) as bar:
            index = consolidate(folder, num_threads=args.threads, on_indexed=lambda _, bar=bar: bar.update())
        counts = ", ".join(f"{bucket} {(index.bucket == i).sum()}" for i, bucket in enumerate(index.buckets))
        print(f"{folder / 'index.json'}: {len(index.paths)} shards, {index.num_samples} samples by bucket: {counts}")
        said = write_where_missing(folder, index.embed_dim, args.negative_prompt_from, args.text_encoder)
        if said is not None:
            print(said)
    if tars:
        with tqdm(total=len(tars), unit="shard", desc="index", disable=None) as bar:
            records = write_sidecars(tars, num_threads=args.threads, on_indexed=lambda _: bar.update())
        print(f"{len(records)} shards indexed, {sum(len(record.keys) for record in records)} samples")


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(
        required=True, metavar="videos|prompts|pairs|world|world-videos|text-encoder|index|verify"
    )
    _add_videos(commands)
    _add_prompts(commands)
    _add_pairs(commands)
    _add_world(commands)
    _add_world_videos(commands)
    _add_text_encoder(commands)
    _add_index(commands)
    _add_verify(commands)
    args, rest = parser.parse_known_args()  # overrides may stand behind options
    if rest and (args.run is not prepare_pairs or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.run is prepare_pairs:
        args.overrides += rest
    return args.run(args)


def _add_videos(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    description = "encode videos and captions: latents and embeddings; with an image-to-video folder first frames too"
    command = commands.add_parser("videos", help=description, description=description)
    command.add_argument(
        "source",
        type=Path,
        metavar="MANIFEST|FOLDER",
        help=".jsonl or .csv with video, caption and perhaps split, paths from its own folder; or a folder of videos"
        " with NAME.txt beside NAME.mp4",
    )
    command.add_argument("--buckets", required=True, help="frames x height x width, several: 81x480x832,81x832x480")
    command.add_argument("--fps", type=positive_fraction, default=Fraction(16), help="of the samples; default: 16")
    command.add_argument("--vae-dtype", choices=DTYPES, default="float32", help="default: float32")
    _add_preparation(command)
    command.set_defaults(run=prepare_videos)


def _add_prompts(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    description = "encode captions alone, for data-free distillation"
    command = commands.add_parser("prompts", help=description, description=description)
    command.add_argument(
        "source", type=Path, metavar="FILE", help="one caption per line; or .jsonl or .csv with caption, perhaps split"
    )
    command.add_argument(
        "--video",
        type=positive_int,
        nargs=3,
        required=True,
        metavar=("FRAMES", "HEIGHT", "WIDTH"),
        help="of the videos that training rolls out",
    )
    _add_preparation(command)
    command.set_defaults(run=prepare_prompts)


def _add_pairs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    description = "noise with what a recipe's guided teacher makes of it, for dmd's regression"
    command = commands.add_parser("pairs", help=description, description=description)
    command.add_argument("recipe", help="YAML file of a distillation; its data.shards have the captions")
    _add_out(command)
    command.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override keys of the recipe")
    command.add_argument("--samples", type=positive_int, help="pairs to make in all; default: one for each caption")
    command.add_argument("--steps", type=positive_int, default=50, help="of the teacher's chain; default: 50")
    _add_shards(command)
    command.set_defaults(run=prepare_pairs)


def _add_preparation(command: argparse.ArgumentParser) -> None:
    _add_out(command)
    command.add_argument("--pretrained", type=Path, required=True, help="local diffusers folder of the pipeline")
    command.add_argument("--split", help="take the rows of this split")
    command.add_argument("--negative-prompt", default="", metavar="TEXT", help="of guidance; default: none")
    command.add_argument("--max-tokens", type=positive_int, help="of a caption; default: the model family's")
    command.add_argument("--text-dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    command.add_argument("--text-batch", type=positive_int, default=16, help="captions at once; default: 16")
    _add_shards(command)


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", type=Path, metavar="OUT", help="folder for the shards; begun before: continue")


def _add_shards(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--shard-megabytes",
        type=positive_float,
        default=512.0,
        help="a shard is closed at this size; default: 512",
    )
    command.add_argument("--retry-skipped", action="store_true", help="try again what was skipped before")


def _add_world(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    world = commands.add_parser("world", help="write the moving-shapes world as shards")
    world.add_argument("out", type=Path, help="folder for the shards")
    world.add_argument("--num-samples", type=int, default=4096)
    world.add_argument("--seed", type=int, default=0)
    world.add_argument("--text-encoder", type=Path, default=Path("recipes/tiny_wan"), help="diffusers folder")
    world.set_defaults(run=prepare_world)


def _add_world_videos(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    videos = commands.add_parser("world-videos", help="the world as mp4 files with captions, and a pipeline")
    videos.add_argument("out", type=Path, help="folder to write into")
    videos.add_argument("--num-samples", type=positive_int, default=32, help="default: 32")
    videos.set_defaults(run=prepare_world_videos)


def _add_text_encoder(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    encoder = commands.add_parser("text-encoder", help="write the world's tiny tokenizer and text encoder")
    encoder.add_argument("out", type=Path, help="diffusers folder to write into")
    encoder.add_argument("--seed", type=int, default=0)
    encoder.set_defaults(run=prepare_text_encoder)


if __name__ == "__main__":
    sys.exit(main())
