"""Benchmarks: launch/bench.py kernels|attention [--models NAME ...] [--dtype DTYPE] [--out FILE.json]

On CUDA each is timed against eager torch, torch.compile and what the card reaches in the same run; elsewhere it is
checked for correctness on small shapes. Exit code 1: a result was wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sgmd_dist.errors import reports_user_errors

DTYPES = ("bfloat16", "float16", "float32")


@reports_user_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="kernels|attention")
    for name, description in (
        ("kernels", "the fused operations: AdaLN, gated residual, norm with rotary embedding, SGMD's outer loss"),
        ("attention", "the attention backends, self and cross"),
    ):
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument("--models", nargs="+", metavar="NAME", help="shapes of these models; default: all")
        command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the activations")
        command.add_argument("--repeats", type=int, default=20, help="timed runs of which the median is taken")
        command.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()

    import torch

    from sgmd_dist.benchmarks import attention, kernels
    from sgmd_dist.benchmarks.shapes import select

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    benchmark = {"kernels": kernels, "attention": attention}[args.command]
    models, dtype = select(args.models, device), getattr(torch, args.dtype)
    report = benchmark.run(models, dtype, device, args.repeats, timed=device.type == "cuda")
    print(report.table())
    if args.out is not None:
        report.write(args.out)
        print(args.out)
    return 0 if report.correct else 1


if __name__ == "__main__":
    sys.exit(main())
