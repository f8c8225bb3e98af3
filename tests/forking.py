"""One server that has imported everything once, from which the processes of tests are forked in milliseconds."""

from __future__ import annotations

import gc
import multiprocessing
import socket

IMPORTED = [
    "pytest",  # of the files whose functions the processes run
    "sgmd_dist.benchmarks.step",
    "sgmd_dist.data.world",
    "sgmd_dist.dryrun",
    "sgmd_dist.evaluation_files",
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


def launchers(world_size: int) -> list[dict[str, str]]:
    """What torchrun sets in the environment of each rank, for one new group of ranks on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(world_size)]
