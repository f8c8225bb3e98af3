"""Export a trained generator as a diffusers transformer folder: launch/export.py RUN_OR_CHECKPOINT OUT [--ema]

A pair of experts becomes two such folders, OUT/transformer and OUT/transformer_2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sgmd_dist.errors import reports_user_errors


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="run folder (its newest checkpoint) or checkpoint folder")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--ema", action="store_true", help="export the moving average of the weights")
    args = parser.parse_args()

    from sgmd_dist import checkpoint
    from sgmd_dist.assemble import load_weights, model_of_checkpoint
    from sgmd_dist.export import export_diffusers

    path = checkpoint.find(args.checkpoint)
    _, model = model_of_checkpoint(path)
    weights = load_weights(path, "generator.ema" if args.ema else "generator", model)
    count = export_diffusers(weights, model, args.out)
    print(f"{args.out}: {count} tensors of {path}, verified by reloading")


if __name__ == "__main__":
    sys.exit(main())
