"""An optimizer step. It knows roles, phases and units, and no objective's or model's name."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from sgmd_dist.batch import Batch
from sgmd_dist.metrics import Metrics
from sgmd_dist.models.base import VideoModel
from sgmd_dist.objectives.base import Objective, Phase, StepState
from sgmd_dist.parallel.mesh import Mesh
from sgmd_dist.recipe import Recipe
from sgmd_dist.roles import build_roles
from sgmd_dist.throughput import Throughput
from sgmd_kernels import dispatch


class Batches(Protocol):
    """Where micro-batches come from: one data-parallel rank's share."""

    def next(self) -> Batch:
        """The next micro-batch of this rank."""
        ...


class Stepper:
    """Takes optimizer steps: roles made of `networks`, an objective's phases on them, micro-batches of `batches`."""

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        objective: Objective,
        networks: Mapping[str, tuple[nn.Module, VideoModel]],
        batches: Batches,
    ) -> None:
        self.recipe = recipe
        self.mesh = mesh
        self.step = 0
        self.objective = objective
        self.roles = build_roles(
            networks,
            {name for name, trained in objective.roles.items() if trained},
            recipe.optim,
            recipe.run.steps,
            recomputes=recipe.parallel.activation_checkpointing != "none",
        )
        self.roles.warm_up(mesh.device)
        self.metrics = Metrics(mesh.device)
        self.noise_seed = recipe.run.seed
        self._skipped_in_a_row: dict[str, Tensor] = {}
        self._longest_row = torch.zeros((), device=mesh.device)
        self._batches = batches
        self._throughput = Throughput(recipe, mesh.device)
        self._steps_since_taken = 0
        self._keeps_batches = False
        self._waited_s = 0.0

    def train_step(self) -> None:
        """One optimizer step: the objective's phases in order."""
        fused = dispatch.fused(self.recipe.parallel.kernels, self.mesh.device.type, dispatch.triton_installed())
        state = StepState(self.step, self.noise_seed, self.mesh.layout.num_units, fused=fused)
        phases = self.objective.phases(self.step)
        self._keeps_batches = any(phase.data == "same" for phase in phases)
        with self.metrics.timed("time/step_s"):
            for phase in phases:
                with self.metrics.timed(f"time/{phase.role}_s"):
                    self._train_phase(phase, state)
        self.metrics.record("data/wait_s", self._waited_s)
        self._waited_s = 0.0
        self.step += 1
        self._steps_since_taken += 1

    def _train_phase(self, phase: Phase, state: StepState) -> None:
        self.roles.train_only(phase.role)
        layout = self.mesh.layout
        for micro in range(layout.accumulation):
            state.unit_index = micro * layout.dp_size + self.mesh.dp_rank
            batch = self._batch(phase, state)
            losses = phase.loss(self.roles, batch, state)
            loss = (losses.per_sample * batch.valid).mean()
            (loss / layout.accumulation).backward()
            for name, value in losses.metrics.items():
                self.metrics.record(name, value, weight=batch.valid)
        self._update(phase, state)

    def _update(self, phase: Phase, state: StepState) -> None:
        """End a phase: the only place that writes to parameters, optimizers and the EMA."""
        self.before_write()
        norm = self.roles.step(phase.role, state.step)
        finite = norm.isfinite()
        self.metrics.record(f"{phase.role}/grad_norm", norm, weight=finite)
        self.metrics.record(f"{phase.role}/skipped", (~finite).float() / self.mesh.layout.world_size, reduce="sum")
        row = torch.where(finite, 0.0, self._skipped_in_a_row.get(phase.role, 0.0) + 1.0)
        self._skipped_in_a_row[phase.role] = row
        self._longest_row = torch.maximum(self._longest_row, row)

    def take_longest_row(self) -> int:
        """The most updates of one role in a row that were skipped, since the last call; waits for the device."""
        longest = int(self._longest_row)
        self._longest_row = torch.zeros_like(self._longest_row)
        return longest

    def before_write(self) -> None:
        """Called before each optimizer step, in which parameters, moments and averages change; a run may wait here."""

    def _batch(self, phase: Phase, state: StepState) -> Batch:
        if phase.data == "same":
            return state.batches[state.unit_index]
        begun = time.perf_counter()
        batch = self._batches.next()
        self._waited_s += time.perf_counter() - begun
        batch = batch.to(self.mesh.device)
        if self._keeps_batches:
            state.batches.setdefault(state.unit_index, batch)
        return batch

    def take_scalars(self) -> dict[str, float]:
        """The metrics since the last call, over all ranks, with rates and the network passes per sample. Collective."""
        self._throughput.record(self.metrics, self.roles, self._steps_since_taken)
        sharers = self.mesh.layout.sequence_size  # each does a part of every pass
        scale = self.recipe.data.global_batch_size * self._steps_since_taken * sharers
        self._steps_since_taken = 0
        for name, passes in self.roles.take_passes().items():
            self.metrics.record(f"passes/{name}", passes / scale, reduce="sum")
        return self._throughput.rates(self.metrics.flush())
