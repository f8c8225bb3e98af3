"""The machine that a run is planned for, and how the recipe lies on it."""

from __future__ import annotations

from dataclasses import dataclass

from sgmd_dist.recipe import Recipe

GIB = 2**30

# Of the GPU's memory, what a run may fill: the rest goes to the CUDA context, NCCL, workspaces and fragmentation.
USABLE_SHARE = 0.92


@dataclass(frozen=True)
class Machine:
    """Equal nodes of equal GPUs.

    Attributes:
        gpu_memory: GiB of a GPU.
        peak_tflops: dense bfloat16 TFLOP/s of a GPU; the default is an H100's.
        mfu: the share of it that passes reach, recomputations counted as work.
        intra_bandwidth, inter_bandwidth: GB/s that a GPU sends to others in its node and across nodes, as collectives
            reach them.
        host_bandwidth: GB/s between a GPU and its host.
        fused_norms: whether torch has RMSNorm as one kernel, as on CUDA; not on a CPU.
    """

    nodes: int
    gpus_per_node: int
    gpu_memory: float
    peak_tflops: float = 989.0
    mfu: float = 0.4
    intra_bandwidth: float = 300.0
    inter_bandwidth: float = 40.0
    host_bandwidth: float = 40.0
    fused_norms: bool = True

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> int:
        return int(USABLE_SHARE * self.gpu_memory * GIB)

    def bandwidth(self, span: int) -> float:
        """Bytes per second of a group whose ranks lie within `span` consecutive ones."""
        return 1e9 * (self.intra_bandwidth if span <= self.gpus_per_node else self.inter_bandwidth)


@dataclass(frozen=True)
class Knobs:
    """The recipe's choices about memory and speed, as plans read them.

    `kept_on`: ranks over which a block's parameters lie between a forward pass and its backward: None for all that
    share them, 1 where each keeps them whole.
    """

    checkpointing: str
    compute_bytes: int
    kept_on: int | None
    forward_prefetch: int
    backward_prefetch: int
    teacher_offload: bool
    asynchronous_saves: bool


def knobs_of(recipe: Recipe) -> Knobs:
    """The knobs that the recipe sets."""
    parallel = recipe.parallel
    reshard = parallel.reshard_after_forward
    return Knobs(
        checkpointing=parallel.activation_checkpointing,
        compute_bytes=2 if recipe.model.compute_dtype == "bfloat16" else 4,
        kept_on=None if reshard is True else 1 if reshard is False else reshard,
        forward_prefetch=parallel.forward_prefetch,
        backward_prefetch=parallel.backward_prefetch,
        teacher_offload=parallel.teacher_offload,
        asynchronous_saves=recipe.checkpoint.asynchronous,
    )
