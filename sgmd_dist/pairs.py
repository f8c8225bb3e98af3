"""Pairs for DMD (arXiv 2311.18828, section 3.3): noise, and what the teacher's chain of many steps makes of it.

Pair number n has the noise of (seed, "pairs", n), rounded to bf16 before the chain starts from it, so that what is
stored is what was integrated. Its caption is number n modulo their count of the shards' captions in a random order.

The teacher is sharded as in training: every forward pass is one of all ranks, and the ranks of a sequence share each
sample. Therefore the ranks go in rounds. In a round each rank of a sequence has its turn with a batch of its own rows,
which all of the sequence integrate and that rank stores; where its rows are done they integrate row 0 once more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sgmd_dist import rng
from sgmd_dist.assemble import build_model, build_networks
from sgmd_dist.batch import padded
from sgmd_dist.data.captions import StoredCaptions
from sgmd_dist.data.digest import content_digest
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.manifest import Row
from sgmd_dist.data.preparation import Sample, Skipped, Summary, prepare
from sgmd_dist.data.stream import negative_embeds
from sgmd_dist.errors import UserError
from sgmd_dist.models.base import LatentShape
from sgmd_dist.objectives._distillation import DistillationSection
from sgmd_dist.parallel.mesh import Mesh
from sgmd_dist.preemption import StopRequest
from sgmd_dist.recipe import Recipe
from sgmd_dist.roles import Role
from sgmd_dist.rollout import GuidanceMode, guided, sample
from sgmd_dist.trainer import open_index

PURPOSE = "pairs"


@dataclass(frozen=True)
class Chain:
    """A teacher's Euler chain: its steps, its time shift, and guidance in diffusers' convention."""

    num_steps: int
    sigma_shift: float
    guidance_scale: float


def chain_of(recipe: Recipe, num_steps: int) -> Chain:
    """The chain of the teacher that `recipe` distils.

    Raises:
        UserError: it distils none, or with a guidance that changes.
    """
    section = recipe.objective
    if not isinstance(section, DistillationSection):
        raise UserError(
            f"objective.name = {section.name}: pairs are made by the teacher of a distillation; give its recipe, or"
            " override it with objective='{name: dmd}'"
        )
    scales = sorted(set(section.guidance_scale.values()))
    if len(scales) > 1:
        raise UserError(
            f"objective.guidance_scale: goes from {scales[0]:g} to {scales[-1]:g} over the training, and pairs are made"
            " once; override it with a number"
        )
    return Chain(num_steps, section.sigma_shift, scales[0])


def make_pairs(
    recipe: Recipe,
    mesh: Mesh,
    out: Path,
    chain: Chain,
    *,
    num_pairs: int | None = None,
    shard_bytes: int,
    retry_skipped: bool = False,
    stop: StopRequest | None = None,
) -> Summary:
    """Write pairs as shards into `out`, or continue what was begun there. Collective.

    The captions are those of the recipe's data.shards, the batches of data.micro_batch_size.

    Args:
        num_pairs: by default one for each sample of the shards. A larger number continues a smaller one.
        stop: once set on one rank, all of them end their shards after the round in work.

    Raises:
        UserError: as `open_index` and `prepare`.
    """
    if build_model(recipe, "teacher").image_input is not None:
        raise UserError(
            "model: pairs are made by text-to-video teachers, and this is an image-to-video model; objectives but dmd"
            " need no pairs"
        )
    index = open_index(recipe, mesh)
    settings = {
        "shards_sha256": index.fingerprint,
        "teacher_sha256": _teacher_digest(recipe),
        "seed": recipe.run.seed,
        "text_tokens": recipe.model.text_tokens,
        **asdict(chain),
    }
    rows = [Row(number, None, None) for number in range(num_pairs or index.num_samples)]
    pairs = PairRows(recipe, mesh, index, chain, stop)
    return prepare(out, rows, settings, pairs, shard_bytes=shard_bytes, retry_skipped=retry_skipped)


def _teacher_digest(recipe: Recipe) -> str:
    """sha256 of what makes the teacher's network: its files, or its configuration and seed, and its dtypes."""
    model = build_model(recipe, "teacher")
    folders = sorted({path.parent for paths in model.weight_files().values() for path in paths})
    weights = content_digest(folders) if folders else [model.config, recipe.run.seed]
    facts = [weights, recipe.model.for_role("teacher").dtype, recipe.model.compute_dtype]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def pair_noise(latent_shape: LatentShape, seed: int, number: int) -> Tensor:
    """The noise of pair `number`, `[C, F, H, W]` bf16."""
    return rng.normal(latent_shape, seed, PURPOSE, number).bfloat16()


class PairRows:
    """Makes pairs of rows, on all ranks of the mesh at the same time; the teacher is loaded when there is a row."""

    def __init__(
        self, recipe: Recipe, mesh: Mesh, index: ShardIndex, chain: Chain, stop: StopRequest | None = None
    ) -> None:
        self._recipe, self._mesh, self._index, self._chain, self._stop = recipe, mesh, index, chain, stop
        self._captions = StoredCaptions(index)
        self._order = rng.permutation(index.num_samples, recipe.run.seed, f"{PURPOSE}/captions")
        self._negative = negative_embeds(index, recipe.model.text_tokens).to(mesh.device)

    def negative_embeds(self) -> Tensor:
        return self._index.negative_prompt()

    def encode(self, rows: Sequence[Row]) -> Generator[tuple[Row, Sample | Skipped], None, None]:
        """Every row once, those of a latent shape together. Collective."""
        batches = [self._batches(share) for share in self._shares(rows)]  # by rank
        own, num_rounds = {row.number: row for row in rows}, max(map(len, batches))
        size = self._mesh.layout.sequence_size
        sequence = range(self._mesh.dp_rank * size, (self._mesh.dp_rank + 1) * size)
        if num_rounds == 0:
            return
        teacher = self._teacher()
        for turn in range(num_rounds):
            if self._is_stopping():
                return
            for rank in sequence:
                is_idle = turn >= len(batches[rank])
                made = self._make(teacher, [0] if is_idle else batches[rank][turn])
                if rank == self._mesh.rank and not is_idle:
                    for number, (caption, result) in zip(batches[rank][turn], made, strict=True):
                        yield replace(own[number], caption=caption), result

    def _shares(self, rows: Sequence[Row]) -> list[list[int]]:
        """The numbers of every rank's rows. Collective."""
        shares: list[list[int]] = [[]] * dist.get_world_size()
        dist.all_gather_object(shares, [row.number for row in rows])
        return shares

    def _batches(self, numbers: Sequence[int]) -> list[list[int]]:
        size, of_shape = self._recipe.data.micro_batch_size, {}
        for number in numbers:
            of_shape.setdefault(self._latent_shape(number), []).append(number)
        return [some[start : start + size] for some in of_shape.values() for start in range(0, len(some), size)]

    def _is_stopping(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        asked = torch.tensor(int(self._stop is not None and self._stop.is_set))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    def _sample_of(self, number: int) -> int:
        """The sample of the shards whose caption pair `number` has."""
        return self._order[number % len(self._order)]

    def _latent_shape(self, number: int) -> LatentShape:
        return self._index.latent_shape(int(self._index.bucket[self._sample_of(number)]))

    def _teacher(self) -> Role:
        module, model = build_networks(self._recipe, self._mesh, {"teacher": False})["teacher"]
        return Role("teacher", module, model)

    def _make(self, teacher: Role, numbers: Sequence[int]) -> list[tuple[str, Sample | Skipped]]:
        """Captions and results of pairs of one latent shape. Collective."""
        samples, shape = [self._sample_of(number) for number in numbers], self._latent_shape(numbers[0])
        captions, embeds = zip(*map(self._captions.read, samples), strict=True)
        noise = torch.stack([pair_noise(shape, self._recipe.run.seed, number) for number in numbers])
        latents = self._integrate(teacher, noise, embeds)
        made: list[tuple[str, Sample | Skipped]] = []
        for row, caption in enumerate(captions):
            if not bool(torch.isfinite(latents[row]).all()):
                made.append((caption, Skipped("the teacher's sample is not finite")))
                continue
            source = f"{self._index.paths[self._index.shard[samples[row]]].name}/{self._index.keys[samples[row]]}"
            bucket = "x".join(map(str, shape))
            made.append((caption, Sample(embeds[row], latents[row], shape, bucket, source, noise=noise[row])))
        return made

    @torch.no_grad()
    def _integrate(self, teacher: Role, noise: Tensor, embeds: Sequence[Tensor]) -> Tensor:
        """The chain from `noise` `[B, C, F, H, W]` to x0 of that shape, float32 on the CPU."""
        tokens, device = self._recipe.model.text_tokens, self._mesh.device
        text = torch.stack([padded(embed, tokens) for embed in embeds])
        mode: GuidanceMode = self._recipe.objective.model_dump()["guidance"]
        velocity = guided(teacher, text.to(device), self._negative, self._chain.guidance_scale, mode)
        return sample(velocity, noise.to(device).float(), self._chain.num_steps, self._chain.sigma_shift).cpu()
