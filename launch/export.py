"""Export a trained generator for diffusers: launch/export.py RUN_OR_CHECKPOINT OUT [--ema] [--merge] [--pipeline]

Writes a transformer's folder, of a pair of experts two, OUT/transformer and OUT/transformer_2; of a LoRA run
pytorch_lora_weights.safetensors. With --pipeline a whole pipeline: the transformers, a scheduler that takes the trained
steps, and the other parts of model.pretrained.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sgmd_dist.errors import UserError, reports_user_errors

if TYPE_CHECKING:
    from torch import Tensor


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="run folder (its newest checkpoint) or checkpoint folder")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--ema", action="store_true", help="export the moving average of the weights")
    parser.add_argument("--merge", action="store_true", help="of a LoRA run: add the adapter to its base's weights")
    parser.add_argument("--pipeline", action="store_true", help="a whole pipeline's folder, with scheduler and card")
    args = parser.parse_args()

    from sgmd_dist import checkpoint
    from sgmd_dist.assemble import load_weights, lora_of, merge_adapter, model_of_checkpoint
    from sgmd_dist.export import export_adapter, export_diffusers

    path = checkpoint.find(args.checkpoint)
    recipe, model = model_of_checkpoint(path)
    lora = lora_of(recipe, "generator", model)
    if args.merge and lora is None:
        raise UserError(f"--merge: {path} holds a whole network, no adapter (model.generator.lora); leave out --merge")
    if args.pipeline and lora is not None and not args.merge:
        raise UserError(f"--pipeline: {path} holds an adapter; add --merge to put it into the pipeline's transformer")
    weights = load_weights(path, "generator.ema" if args.ema else "generator", model, lora)
    if args.pipeline:
        whole = weights if lora is None else merge_adapter(model, weights, lora, recipe.run.seed)
        count, what = _pipeline(whole, args), "tensors in a pipeline"
    elif lora is None:
        count, what = export_diffusers(weights, model, args.out), "tensors"
    elif args.merge:
        merged = merge_adapter(model, weights, lora, recipe.run.seed)
        count, what = export_diffusers(merged, model, args.out), "tensors, the adapter added,"
    else:
        count, what = export_adapter(weights, lora, model, args.out), f"tensors of an adapter of rank {lora.rank}"
    print(f"{args.out}: {count} {what} of {path}, verified by reloading")


def _pipeline(weights: dict[str, Tensor], args: argparse.Namespace) -> int:
    from sgmd_dist.pipeline import export_pipeline, origin_of
    from sgmd_dist.sampling import open_source

    source = open_source(args.checkpoint)
    num_steps, shift = source.few_steps
    origin = origin_of(source, "generator.ema" if args.ema else "generator")
    return export_pipeline(weights, source.model, num_steps, shift, origin, args.out)


if __name__ == "__main__":
    sys.exit(main())
