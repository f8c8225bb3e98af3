"""What a checkpoint holds of a run: trees of tensors, and numbers that are equal for every sharding of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from sgmd_dist.checksum import bits, wrap
from sgmd_dist.roles import Role, Roles
from sgmd_dist.shard import counts_here, local

Tree = dict[str, dict[str, Tensor]]  # "generator", "generator.optimizer", "generator.ema", ... -> name -> tensor


def training_state(roles: Roles) -> Tree:
    """Every tensor that a resumed run needs, by tree and name; views of the live ones, so loading fills them."""
    tree: Tree = {}
    for role in roles.trained:
        tree[role.name] = {name: p.detach() for name, p in role.parameters.items()}
        tree[f"{role.name}.optimizer"] = _optimizer_tensors(role)
        if role.ema is not None:
            tree[f"{role.name}.ema"] = role.ema.shadow
    return tree


def _optimizer_tensors(role: Role) -> dict[str, Tensor]:
    """AdamW's step and moments per parameter; an optimizer that never stepped gets the zeros it would start with."""
    assert role.optimizer is not None
    tensors: dict[str, Tensor] = {}
    for name, parameter in role.parameters.items():
        state = role.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors.update({f"{name}.{key}": value for key, value in state.items()})
    return tensors


def checksums(tree: Tree) -> dict[str, int]:
    """Per tree, the sum over all elements of their bits as integers, modulo 2^64: equal for every sharding.

    Collective.
    """
    own = local_checksums(tree)
    total = torch.tensor(list(own.values()), dtype=torch.int64)
    dist.all_reduce(total)  # the default group has a CPU backend beside NCCL
    return dict(zip(own, total.tolist(), strict=True))


def local_checksums(tree: Tree) -> dict[str, int]:
    """This rank's summands of `checksums`: each slice counts on one of the ranks that hold it."""
    return {
        name: wrap(sum(_on_host(bits(local(tensor)) for tensor in part.values() if counts_here(tensor))))
        for name, part in tree.items()
    }


@torch.no_grad()
def is_finite(tree: Tree) -> bool:
    """True if this rank's parts hold no NaN and no infinity."""
    extremes = (
        torch.stack(local(tensor).aminmax()).isfinite().all()
        for part in tree.values()
        for tensor in part.values()
        if local(tensor).numel() and tensor.is_floating_point()
    )
    return all(_on_host(extremes))


def _on_host(scalars: Iterable[Tensor]) -> list[int]:
    """The scalars' values by one transfer from each device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for scalar in scalars:
        by_device.setdefault(scalar.device, []).append(scalar)
    return [value for found in by_device.values() for value in torch.stack(found).tolist()]
