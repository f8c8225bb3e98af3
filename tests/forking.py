"""One server that has imported everything once, from which the processes of tests are forked in milliseconds."""

from __future__ import annotations

import gc
import multiprocessing

IMPORTED = [
    "pytest",  # of the files whose functions the processes run
    "sgmd_dist.benchmarks.step",
    "sgmd_dist.data.world",
    "sgmd_dist.dryrun",
    "sgmd_dist.evaluation",
    "sgmd_dist.export",
    "sgmd_dist.models.wan",
    "sgmd_dist.objectives.dmd2",
    "sgmd_dist.objectives.sgmd",
    "sgmd_dist.objectives.sid",
    "sgmd_dist.objectives.sim",
    "sgmd_dist.planner.plan",
    "sgmd_dist.preflight",
    "sgmd_dist.trainer",
    "torch._dynamo.convert_frame",
    "torch.distributed.checkpoint",
]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(IMPORTED)


def keep_what_was_imported() -> None:
    """Call it first in a forked process: garbage collection passes over what came with the fork. To go through all that
    was imported takes 0.3 s each time, a third of a short run."""
    gc.freeze()
