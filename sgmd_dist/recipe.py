"""The recipe: what a run is, as frozen pydantic sections. `sgmd_dist.recipe_file` reads it from YAML.

The `objective` and `model` sections belong to their plug-ins: `objective.name` and `model.family` name a module
in `sgmd_dist/objectives` or `sgmd_dist/models`, whose `Section` class extends the one here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, create_model, field_validator
from pydantic_core import PydanticCustomError

from sgmd_dist import registry
from sgmd_dist.layout import Layout, place
from sgmd_dist.samples_section import SamplesSection
from sgmd_dist.schedule import NonNegative, Positive, UnitInterval, constant
from sgmd_dist.section import Section, wrong
from sgmd_dist.watch_sections import HealthSection, LoggingSection

RoleName = Literal["teacher", "generator", "fake_score"]
DType = Literal["bfloat16", "float32"]
AttentionBackend = Literal[
    "auto", "flash_attn_3", "flash_attn_4", "cudnn", "flash_attn_2", "flash", "efficient", "math"
]
KIND_OF_SECTION = {"model": registry.MODELS, "objective": registry.OBJECTIVES}


class RunSection(Section):
    """Name, place and length of the run.

    `resume`: `auto` continues from the newest committed checkpoint of `dir`, `never` starts anew (and moves the
    folder of earlier checkpoints aside), a path continues from that checkpoint or run. The path of another run's
    checkpoint counts while `dir` has none of its own.
    """

    name: str = "run"
    dir: str = "runs/run"
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int = Field(default=1000, ge=1)
    resume: str = "auto"
    log_every: int = Field(default=10, ge=1)


class RoleModel(Section):
    """Where one role differs from the `model` section: its weights and the dtype in which they are kept.

    `dtype` defaults to `model.compute_dtype` for the frozen teacher and to float32 for the trained roles.
    """

    pretrained: str | None = None
    dtype: DType | None = None


class LoraSection(Section):
    """A low-rank adapter: y = W x + (alpha / rank) B A x, on every linear layer whose name ends with a target.

    `alpha` defaults to the rank, `targets` to all layers that the model family can adapt.
    """

    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    targets: list[str] | None = Field(default=None, min_length=1, description="a list of layers, as in [to_q, to_k]")


class TrainedRoleModel(RoleModel):
    """A trained role: its master weights are float32 under mixed precision.

    With `lora` they are an adapter's, on a frozen base in the teacher's dtype.
    """

    dtype: Literal["float32"] | None = Field(
        default=None,
        description="float32: a trained role keeps float32 master weights and computes in model.compute_dtype",
    )
    lora: LoraSection | None = None


class ModelSection(Section):
    """Keys that every model family has; a family's own `Section` adds `config` and what else it needs.

    `pretrained` is a local diffusers folder: a pipeline, or its transformer's folder. Without it the network
    starts from random weights made from `config`; beside it `config` is what the folder must hold. Relative paths
    start at the working directory.
    """

    family: str
    pretrained: str | None = None
    compute_dtype: DType = "bfloat16"
    text_tokens: int = Field(default=512, ge=1)
    teacher: RoleModel = RoleModel()
    generator: TrainedRoleModel = TrainedRoleModel()
    fake_score: TrainedRoleModel = TrainedRoleModel()

    def for_role(self, role: str) -> RoleModel:
        """The role's section with every default filled in."""
        own: RoleModel = getattr(self, role)
        dtype = self.compute_dtype if role == "teacher" else "float32"
        return RoleModel(pretrained=own.pretrained or self.pretrained, dtype=own.dtype or dtype)

    def lora_of(self, role: str) -> LoraSection | None:
        """The role's adapter; None where the role has a network of its own."""
        return getattr(getattr(self, role), "lora", None)


class HeadSection(Section):
    """A head on the blocks of a trained role's network, which makes one number of each sample; see `sgmd_dist.heads`.

    `blocks`: the blocks that it reads, from 0; by default those in the middle, at three quarters and at the end.
    `width` of its layers. `lr_ratio`: its learning rate over that of the network's.
    """

    key: ClassVar[str]  # where a recipe has the section

    blocks: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, min_length=1, description="a list of numbers of blocks, from 0, as in [14, 22, 29]"
    )
    width: int = Field(default=256, ge=1)
    lr_ratio: float = Field(default=1.0, gt=0)

    @field_validator("blocks")
    @classmethod
    def _ascending(cls, blocks: list[int] | None) -> list[int] | None:
        if blocks is not None and blocks != sorted(set(blocks)):
            raise wrong("expected ascending numbers of blocks, each once")
        return blocks


class ObjectiveSection(Section):
    """Keys that every objective has; each objective's own `Section` adds its loss schedule."""

    name: str
    exit_groups: int = Field(default=1, ge=1)

    def head_of(self, role: str) -> HeadSection | None:
        """The head that the objective puts on a role's network; None where it needs none."""
        return None


class AdamWSection(Section):
    """torch.optim.AdamW for one role. `lr` may be a schedule; `optim.schedule` multiplies it."""

    lr: Positive = constant(2e-6)
    betas: tuple[float, float] = Field(default=(0.0, 0.999), description="two numbers in [0, 1), as in [0.0, 0.999]")
    weight_decay: float = Field(default=0.01, ge=0)
    eps: float = Field(default=1e-8, gt=0)

    @field_validator("betas")
    @classmethod
    def _betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise wrong("expected two numbers in [0, 1), as in [0.0, 0.999]")
        return betas


class LrScheduleSection(Section):
    """Factor on every learning rate: `warmup_steps` linear from 0, then constant, or down to `final_ratio`
    at `run.steps` along a line or a cosine."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    final_ratio: float = Field(default=0.0, ge=0, le=1)


class EmaSection(Section):
    """Exponential moving average of the generator: ema <- decay ema + (1 - decay) generator, from `start_step`
    on; a plain copy before. `decay: 0` keeps the EMA equal to the generator."""

    decay: UnitInterval = constant(0.99)
    start_step: int = Field(default=0, ge=0)


class OptimSection(Section):
    """Optimizers of the trained roles, gradient clipping, learning-rate schedule and EMA."""

    generator: AdamWSection = AdamWSection()
    fake_score: AdamWSection = AdamWSection()
    max_grad_norm: NonNegative = constant(10.0)
    schedule: LrScheduleSection = LrScheduleSection()
    ema: EmaSection = EmaSection()


class VideoSection(Section):
    """Size of the videos to generate, in frames and pixels."""

    num_frames: int = Field(default=81, ge=1)
    height: int = Field(default=480, ge=1)
    width: int = Field(default=832, ge=1)


class DataSection(Section):
    """The stream. `shards`: a folder, a pattern, a list of them, `prompts:FILE` or `world:moving_shapes`.
    The last two are encoded once with `text_encoder` (default: model.pretrained), prompts for videos of `video`.

    `global_batch_size` is what one optimizer step sees on any number of ranks; `lanes` and `window` shape the
    order (a lane is read front to back, shuffled inside windows). `weights` are the proportions in which the entries
    of `shards` are mixed, instead of each sample once per epoch; `max_samples` uses so many samples of the data set.
    `on_error: skip` delivers an unreadable sample with weight 0, at most `max_skips` times; before, a read that failed
    for want of the network or the disk is repeated `retries` times, and given up after `read_timeout` seconds. `crc`
    compares every sample with its checksum. Shards of pipe:, http(s):, s3:, gs: and hf: are kept whole in `cache`, a
    folder on each node's disk (default: in the folder for temporary files), the least recently used given up beyond
    `cache_gb` GB.
    """

    shards: str | list[str] = Field(
        description="a folder, a pattern, prompts:FILE, world:moving_shapes, or a list of those"
    )
    global_batch_size: int = Field(default=64, ge=1)
    micro_batch_size: int = Field(default=1, ge=1)
    on_error: Literal["raise", "skip"] = "raise"
    max_skips: int = Field(default=0, ge=0)
    lanes: int = Field(default=64, ge=1)
    window: int = Field(default=1024, ge=1)
    weights: list[Annotated[float, Field(gt=0)]] | None = None
    max_samples: int | None = Field(default=None, ge=1)
    retries: int = Field(default=4, ge=0, le=100)
    read_timeout: float = Field(default=300.0, gt=0, description="seconds below health.timeout")
    crc: bool = True
    cache: str | None = None
    cache_gb: float = Field(default=200.0, gt=0)
    threads: int = Field(default=2, ge=1, le=8)
    text_encoder: str | None = None
    video: VideoSection | None = None

    @field_validator("shards")
    @classmethod
    def _not_empty(cls, shards: str | list[str]) -> str | list[str]:
        if not shards or "" in shard_list(shards):
            raise PydanticCustomError("empty", "empty")
        return shards

    @field_validator("weights")
    @classmethod
    def _one_each(cls, weights: list[float] | None, info: ValidationInfo) -> list[float] | None:
        if weights is not None and "shards" in info.data and len(weights) != len(shard_list(info.data["shards"])):
            raise wrong(f"expected {len(shard_list(info.data['shards']))} numbers, one for each entry of data.shards")
        return weights


class ParallelSection(Section):
    """Mesh axes and how blocks run. `dp_shard: -1` takes the ranks that the other axes leave.

    `ulysses` x `ring` ranks share each sequence: ulysses ranks part the heads, ring ranks pass keys round.
    `activation_checkpointing: block` recomputes each block in the backward pass, `selective` all of it but its
    self-attention. `compile` compiles each block. `reshard_after_forward: false` keeps gathered blocks until their
    backward pass, or until the phase ends; a number gathers them again from so many neighbouring ranks.
    `forward_prefetch`, `backward_prefetch`: blocks that are gathered ahead. `teacher_offload` keeps the teacher's
    shards in the host's memory.
    `attention` is a backend of sgmd_kernels.attention; `auto` takes the fastest that is there.
    `kernels: auto` runs the fused operations of sgmd_kernels on CUDA devices where triton is installed; `off` is the
    default until `launch/bench.py kernels` has shown on a GPU that they beat torch.compile.
    """

    dp_replicate: int = Field(default=1, ge=1)
    dp_shard: int = Field(default=-1, ge=-1, description="-1 (the ranks that the other axes leave) or an integer >= 1")
    ulysses: int = Field(default=1, ge=1)
    ring: int = Field(default=1, ge=1)
    activation_checkpointing: Literal["none", "block", "selective"] = "block"
    compile: bool = False
    reshard_after_forward: bool | int = Field(default=True, description="true, false, or a number of ranks >= 2")
    forward_prefetch: int = Field(default=1, ge=0)
    backward_prefetch: int = Field(default=1, ge=0)
    teacher_offload: bool = False
    attention: AttentionBackend = "auto"
    kernels: Literal["auto", "off"] = "off"

    @field_validator("dp_shard")
    @classmethod
    def _dp_shard(cls, dp_shard: int) -> int:
        if dp_shard == 0:
            raise wrong("expected -1 (the ranks that the other axes leave) or an integer >= 1")
        return dp_shard

    @field_validator("reshard_after_forward")
    @classmethod
    def _ranks(cls, reshard_after_forward: bool | int) -> bool | int:
        if not isinstance(reshard_after_forward, bool) and reshard_after_forward < 2:
            raise wrong("expected true, false, or a number of ranks >= 2")
        return reshard_after_forward

    @field_validator("kernels", mode="before")
    @classmethod
    def _off(cls, kernels: object) -> object:
        return "off" if kernels is False else kernels  # YAML reads a bare `off` as false


class CheckpointSection(Section):
    """A checkpoint every `every` steps and at the end; the newest `keep` stay.

    `async` trains on while a copy in host memory is written.
    """

    every: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)
    asynchronous: bool = Field(default=True, alias="async")


class Recipe(Section):
    """A whole run. Build it with `sgmd_dist.recipe_file.load_recipe`."""

    run: RunSection = RunSection()
    model: SerializeAsAny[ModelSection]
    objective: SerializeAsAny[ObjectiveSection]
    optim: OptimSection = OptimSection()
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    samples: SamplesSection | None = None
    logging: LoggingSection = LoggingSection()
    health: HealthSection = HealthSection()

    def layout(self, world_size: int) -> Layout:
        """Place the recipe on `world_size` ranks.

        Raises:
            UserError: ranks, batch sizes or exit groups do not divide; the message has the numbers.
        """
        return place(self, world_size)

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, in plain types: what is written to the run folder."""
        return self.model_dump(mode="json", by_alias=True)


def recipe_class(plugins: dict[str, str]) -> type[Recipe]:
    """`Recipe` with the sections of the named plug-ins, as in `{"model": "wan", "objective": "sgmd"}`.

    The same names give the same class, so that two equal recipes compare equal.

    Raises:
        UserError: a name is not known.
    """
    return _recipe_class(tuple(sorted(plugins.items())))


@cache
def _recipe_class(plugins: tuple[tuple[str, str], ...]) -> type[Recipe]:
    sections: Any = {field: (registry.load(KIND_OF_SECTION[field], name).Section, ...) for field, name in plugins}
    return create_model("Recipe", __base__=Recipe, **sections)


def shard_list(shards: str | Sequence[str]) -> list[str]:
    """`data.shards` as a list."""
    return [shards] if isinstance(shards, str) else list(shards)
