"""What ranks do in these tests: train a recipe and hand back the full state."""

from __future__ import annotations

import math
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sgmd_dist.checkpoint import training_state
from sgmd_dist.errors import EXIT_DONE, EXIT_PREEMPTED
from sgmd_dist.parallel.mesh import build_mesh, process_group, world_size
from sgmd_dist.recipe_file import load_recipe
from sgmd_dist.trainer import Trainer

REPO = Path(__file__).parents[2]
State = dict[str, dict[str, torch.Tensor]]
Part = tuple[tuple[int, ...], np.ndarray]


def train(
    recipe_path: Path,
    overrides: Sequence[str] = (),
    trainer_class: type[Trainer] = Trainer,
    exit_code: int = EXIT_DONE,
) -> State:
    """Train the recipe to its end; returns every tensor of the training state, gathered (on rank 0)."""
    recipe = load_recipe(recipe_path, overrides)
    with process_group() as device:
        trainer = trainer_class(recipe, build_mesh(recipe.layout(world_size()), device))
        try:
            assert trainer.fit() == exit_code
            return gathered(trainer)
        finally:
            trainer.close()
            del trainer


class Unsaved(Trainer):
    """Ends without a checkpoint, which takes as long as three steps, where only its state is looked at."""

    def save(self) -> None:
        pass


def train_unsaved(recipe_path: Path, overrides: Sequence[str] = ()) -> State:
    """`train` for its state alone."""
    return train(recipe_path, overrides, Unsaved)


class StoppedInStep2(Trainer):
    """Asked to stop while its second step runs."""

    def train_step(self) -> None:
        if self.step == 1:
            signal.raise_signal(signal.SIGTERM)
        super().train_step()


def train_until_stopped(recipe_path: Path, overrides: Sequence[str]) -> None:
    """Train the recipe, which is asked to stop in step 2 and has to heed it."""
    train(recipe_path, overrides, StoppedInStep2, EXIT_PREEMPTED)


def train_command(recipe_path: Path, overrides: list[str]) -> None:
    """What `launch/train.py` does, in this process."""
    sys.argv = ["launch/train.py", str(recipe_path), *overrides]
    runpy.run_path(str(REPO / "launch/train.py"), run_name="__main__")


def gathered(trainer: Trainer) -> State:
    """The full tensors of the training state; empty on all ranks but rank 0. Collective, once for all tensors: one
    `full_tensor` after the other takes as long as three steps."""
    tree = training_state(trainer.roles)
    parts = {name: {key: _part(tensor) for key, tensor in tensors.items()} for name, tensors in tree.items()}
    ranks: list[Any] | None = [None] * world_size() if trainer.mesh.is_main else None
    dist.gather_object(parts, ranks)
    if ranks is None:
        return {}
    return {
        name: {key: _whole(tensor, [rank[name][key] for rank in ranks]) for key, tensor in tensors.items()}
        for name, tensors in tree.items()
    }


def _part(tensor: torch.Tensor) -> Part:
    """What this rank holds, as an array, which is sent several times as fast as a tensor, and where in the whole it begins."""
    offset: Sequence[int] = (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        tensor = tensor.to_local()
    tensor = tensor.detach()
    return tuple(offset), (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _whole(tensor: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """The tensor of which each rank holds one of the parts; what no rank holds is not a number."""
    whole = torch.full(tensor.shape, math.nan).to(tensor.dtype)
    for offset, part in parts:
        here = tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))
        whole[here] = torch.from_numpy(part)
    return whole


def max_difference(a: State, b: State) -> dict[str, float]:
    """Largest absolute difference per tree; the trees must hold the same names."""
    assert {name: part.keys() for name, part in a.items()} == {name: part.keys() for name, part in b.items()}
    return {name: max(float((a[name][key] - b[name][key]).abs().max()) for key in part) for name, part in a.items()}


def parameter_difference(a: State, b: State) -> float:
    """Largest absolute difference of the parameters of generator, fake score and EMA."""
    differences = max_difference(a, b)
    return max(value for name, value in differences.items() if not name.endswith(".optimizer"))
