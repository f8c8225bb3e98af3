"""The plain trainer with adapters: three bases, low-rank layers written out, optimizers of the adapters alone."""

from __future__ import annotations

import torch
from reference import Reference
from torch import Tensor, nn

from sgmd_dist import rng

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


class LowRank(nn.Module):
    """y = W x + b + scale B A x with a frozen W and b."""

    def __init__(self, base: nn.Linear, a: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A, self.lora_B = nn.Module(), nn.Module()
        self.lora_A.weight = nn.Parameter(a)
        self.lora_B.weight = nn.Parameter(torch.zeros(base.out_features, a.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_A.weight.T @ self.lora_B.weight.T * self.scale


class LoraReference(Reference):
    """`Reference` whose roles with `lora` train an adapter on a copy of the teacher of their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("generator", "fake_score"):
            if self.recipe.model.lora_of(name):
                self.adapt(name)
        self.ema = {name: p.detach().clone() for name, p in self.generator.named_parameters()}
        self.optimizers = {"generator": self._adamw("generator"), "fake_score": self._adamw("fake_score")}

    def adapt(self, name: str) -> None:
        network, lora = getattr(self, name), self.recipe.model.lora_of(name)
        network.requires_grad_(False)
        scale = (lora.alpha or lora.rank) / lora.rank
        for layer_name, layer in list(network.named_modules()):
            if isinstance(layer, nn.Linear) and layer_name.endswith(tuple(lora.targets or TARGETS)):
                purpose = f"init/{name}/{layer_name}.lora_A.weight"
                a = rng.normal((lora.rank, layer.in_features), self.recipe.run.seed, purpose)
                network.set_submodule(layer_name, LowRank(layer, a / (3 * layer.in_features) ** 0.5, scale))

    def _adamw(self, name: str) -> torch.optim.AdamW:
        section = getattr(self.recipe.optim, name)
        parameters = trained(getattr(self, name)).values()
        return torch.optim.AdamW(
            parameters, lr=section.lr.at(0), betas=section.betas, eps=section.eps, weight_decay=section.weight_decay
        )

    def update(self, name: str, network: nn.Module) -> None:
        torch.nn.utils.clip_grad_norm_(trained(network).values(), self.recipe.optim.max_grad_norm.at(0))
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()

    def train(self) -> dict[str, dict[str, Tensor]]:
        state = super().train()
        return {
            "generator": {name: p.detach() for name, p in trained(self.generator).items()},
            "fake_score": {name: p.detach() for name, p in trained(self.fake_score).items()},
            "generator.ema": {name: state["generator.ema"][name] for name in trained(self.generator)},
        }


def trained(network: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}
