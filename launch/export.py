"""Export a trained generator for diffusers or ComfyUI: launch/export.py RUN_OR_CHECKPOINT OUT

Writes a transformer's folder, of a pair of experts two, OUT/transformer and OUT/transformer_2; of a LoRA run
pytorch_lora_weights.safetensors. With --pipeline a whole pipeline: the transformers, a scheduler that takes the trained
steps, and the other parts of model.pretrained. With --keys original the names that ComfyUI reads. docs/export.md shows
each form.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sgmd_dist.errors import UserError, positive_int, reports_user_errors

if TYPE_CHECKING:
    from torch import Tensor

    from sgmd_dist.adapters import Lora
    from sgmd_dist.assemble import Which
    from sgmd_dist.card import Origin
    from sgmd_dist.export import Form
    from sgmd_dist.sampling import Source


def _size(text: str) -> str:
    """An argument: a size as diffusers takes it."""
    if not re.fullmatch(r"0*[1-9]\d*[KMGT]B", text):
        raise argparse.ArgumentTypeError(f"{text}: expected a size such as 5GB or 500MB")
    return text


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="run folder (its newest checkpoint) or checkpoint folder")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--ema", action="store_true", help="export the moving average of the weights")
    parser.add_argument("--merge", action="store_true", help="of a LoRA run: add the adapter to its base's weights")
    parser.add_argument("--svd-rank", type=positive_int, metavar="R", help="the change from the base, as a LoRA")
    parser.add_argument("--pipeline", action="store_true", help="a whole pipeline's folder, with its scheduler")
    parser.add_argument("--keys", choices=["diffusers", "original"], default="diffusers", help="names of the tensors")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the files' tensors")
    parser.add_argument("--max-shard-size", type=_size, help="largest file of a diffusers folder; default: 5GB")
    args = parser.parse_args()

    from sgmd_dist.assemble import load_weights, lora_of
    from sgmd_dist.export import with_original_names
    from sgmd_dist.sampling import open_source

    source = open_source(args.checkpoint)
    lora = lora_of(source.recipe, "generator", source.model)
    _refuse(args, lora, source.checkpoint)
    if args.keys == "original":
        with_original_names(source.model)
    weights = load_weights(source.checkpoint, _which(args), source.model, lora)
    count, what = _export(weights, lora, source, args)
    print(f"{args.out}: {count} {what} of {source.checkpoint}, {args.dtype}, verified by reloading")


def _which(args: argparse.Namespace) -> Which:
    return "generator.ema" if args.ema else "generator"


def _refuse(args: argparse.Namespace, lora: Lora | None, path: Path) -> None:
    """Options that contradict one another or the run."""
    from sgmd_dist.parallel.mesh import world_size

    if world_size() > 1:
        raise UserError(
            f"launch/export.py: {world_size()} ranks would write one folder; start it with python, not torchrun"
        )
    if args.out.exists():
        raise UserError(f"{args.out}: exists already; choose another folder or remove it")
    if args.merge and lora is None:
        raise UserError(f"--merge: {path} holds a whole network, no adapter (model.generator.lora); leave out --merge")
    if args.svd_rank and lora is not None:
        raise UserError(f"--svd-rank: {path} holds an adapter already; leave out --svd-rank")
    if args.pipeline and lora is not None and not args.merge:
        raise UserError(f"--pipeline: {path} holds an adapter; add --merge to put it into the pipeline's transformer")
    if args.pipeline and args.svd_rank:
        raise UserError("--pipeline, --svd-rank: a pipeline holds the whole transformer; leave out one of them")
    if args.pipeline and args.keys == "original":
        raise UserError("--pipeline, --keys original: a pipeline has diffusers' names; leave out one of them")
    is_adapter = bool(args.svd_rank) or (lora is not None and not args.merge)
    if args.max_shard_size and (is_adapter or args.keys == "original"):
        raise UserError("--max-shard-size: only diffusers' folders are split, this export is one file for each network")


def _export(weights: dict[str, Tensor], lora: Lora | None, source: Source, args: argparse.Namespace) -> tuple[int, str]:
    """Write what was asked for; returns the number of tensors, and what they are."""
    from sgmd_dist.assemble import merge_adapter
    from sgmd_dist.card import adapter_card, network_card
    from sgmd_dist.export import export_adapter, export_diffusers, export_original

    origin, is_original = _origin(source, args), args.keys == "original"
    if args.svd_rank:
        weights, lora = _low_rank(weights, source, args.svd_rank)
    if lora is not None and not args.merge:
        form = _form(args, adapter_card(origin, lora, original=is_original))
        count = export_adapter(weights, lora, source.model, args.out, form, original=is_original)
        return count, f"tensors of an adapter of rank {lora.rank}"
    what = "tensors"
    if lora is not None:
        weights, what = (
            merge_adapter(source.model, weights, lora, source.recipe.run.seed),
            "tensors, the adapter added,",
        )
    if args.pipeline:
        return _pipeline(weights, source, origin, args), f"{what} in a pipeline"
    form = _form(args, network_card(origin, original=is_original))
    export = export_original if is_original else export_diffusers
    return export(weights, source.model, args.out, form), what


def _pipeline(weights: dict[str, Tensor], source: Source, origin: Origin, args: argparse.Namespace) -> int:
    from sgmd_dist.pipeline import export_pipeline

    num_steps, shift = source.few_steps
    return export_pipeline(weights, source.model, num_steps, shift, origin, args.out, _form(args, {}))


def _low_rank(weights: dict[str, Tensor], source: Source, rank: int) -> tuple[dict[str, Tensor], Lora]:
    import torch

    from sgmd_dist.assemble import low_rank_adapter

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lora, found = low_rank_adapter(source.model, weights, rank, device)
    print(found.report(), flush=True)
    return found.adapter, lora


def _origin(source: Source, args: argparse.Namespace) -> Origin:
    from sgmd_dist.card import origin_of

    facts = {"dtype": args.dtype}
    if args.merge:
        facts["made of them"] = "the base with the adapter added"
    if args.svd_rank:
        facts["made of them"] = f"their change from the base, at rank {args.svd_rank}"
    return origin_of(source, _which(args), facts)


def _form(args: argparse.Namespace, notes: dict[str, str]) -> Form:
    import torch

    from sgmd_dist.export import Form
    from sgmd_dist.models.base import MAX_SHARD_SIZE

    return Form(getattr(torch, args.dtype), args.max_shard_size or MAX_SHARD_SIZE, notes)


if __name__ == "__main__":
    sys.exit(main())
