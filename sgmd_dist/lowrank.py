"""The change of a fine-tuned network's linear layers as an adapter, by truncated singular value decomposition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sgmd_dist import rng

_OVERSAMPLING = 4  # directions that are looked at, over those that are kept
_ITERATIONS = 8


@dataclass(frozen=True)
class LowRank:
    """A change W' - W of a network, cut to a rank.

    Attributes:
        adapter: A `[rank, in]` and B `[out, rank]` of every linear layer, float32, W' - W ~ B A, by adapters' names.
        energies: of the layers that changed, ||B A||^2 / ||W' - W||^2 (Frobenius), at most 1.
        left_out: squared norms of the changes of all other tensors that changed.
        total: the squared norm of the whole change.
    """

    adapter: dict[str, Tensor]
    energies: dict[str, float]
    left_out: dict[str, float]
    total: float

    def report(self) -> str:
        """What is kept and what is left out, in a line."""
        worst = min(self.energies, key=lambda layer: self.energies[layer])
        mean = sum(self.energies.values()) / len(self.energies)
        kept = (
            f"of the change of {len(self.energies)} linear layers, squared, kept: {mean:.4f} in the mean,"
            f" {self.energies[worst]:.4f} at least ({worst})"
        )
        if not self.left_out:
            return f"{kept}; nothing else changed"
        kinds = Counter(_kind(name) for name in self.left_out)
        share = sum(self.left_out.values()) / self.total
        names = ", ".join(kind if number == 1 else f"{number} {kind}" for kind, number in kinds.items())
        return f"{kept}; left out, {share:.2g} of the whole change: {names}"


def low_rank(
    tuned: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    layers: Iterable[str],
    rank: int,
    device: torch.device | str = "cpu",
) -> LowRank:
    """Cut the change from `base` to `tuned` to `rank`, layer by layer.

    Args:
        layers: names of the linear layers, without `.weight`.
        device: that computes.
    """
    squares = {name: _change(tuned, base, name, "cpu").square().sum().item() for name in base}
    adapter: dict[str, Tensor] = {}
    energies: dict[str, float] = {}
    for layer in layers:
        change, square = _change(tuned, base, f"{layer}.weight", device), squares[f"{layer}.weight"]
        a, b = truncated(change, rank, layer)
        adapter |= {f"{layer}.lora_A.weight": a.cpu(), f"{layer}.lora_B.weight": b.cpu()}
        if square > 0:
            energies[layer] = min(1.0, torch.trace((b.T @ b) @ (a @ a.T)).item() / square)
    covered = {name.replace(".lora_A.", ".") for name in adapter}
    left_out = {name: square for name, square in squares.items() if square > 0 and name not in covered}
    return LowRank(adapter, energies, left_out, sum(squares.values()))


def truncated(change: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """A `[rank, in]` and B `[out, rank]` with B A next to `change` `[out, in]` in the Frobenius norm.

    By subspace iteration from random directions that follow from `name`; exact where a quarter of the smaller side is
    at most the rank. Rows beyond the smaller side are zero.
    """
    num_directions = min(_OVERSAMPLING * rank, *change.shape)
    start = rng.normal((change.shape[1], num_directions), 0, f"low_rank/{name}").to(change)
    basis = torch.linalg.qr(change @ start).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(change @ torch.linalg.qr(change.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ change, full_matrices=False)
    kept = min(rank, num_directions)
    roots = values[:kept].sqrt()
    a, b = change.new_zeros(rank, change.shape[1]), change.new_zeros(change.shape[0], rank)
    a[:kept] = roots[:, None] * right[:kept]
    b[:, :kept] = basis @ left[:, :kept] * roots
    return a, b


def _change(tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], name: str, device: torch.device | str) -> Tensor:
    return tuned[name].to(device, torch.float32) - base[name].to(device, torch.float32)


def _kind(name: str) -> str:
    """What a tensor that is no linear layer's weight is called among its like."""
    parts = name.split(".")
    if parts[-1] == "bias":
        return "biases"
    if any("norm" in part for part in parts):
        return "norms' weights"
    return parts[-1] if parts[-1] != "weight" else parts[-2]
