"""The plain trainer with DMD2's GAN term, written from its formulas with a head of its own."""

from __future__ import annotations

from collections import defaultdict

import torch
from reference import Reference
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from sgmd_dist import rng
from sgmd_dist.batch import Batch


class PlainHead(nn.Module):
    """LayerNorm, projection and SiLU of each token, the mean over tokens, two layers on the means side by side."""

    def __init__(self, num_inputs: int, token_width: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(token_width) for _ in range(num_inputs))
        self.projections = nn.ModuleList(nn.Linear(token_width, width) for _ in range(num_inputs))
        self.mix, self.logit = nn.Linear(num_inputs * width, width), nn.Linear(width, 1)

    def forward(self, tokens: list[Tensor]) -> Tensor:
        each = [silu(p(norm(x))).mean(1) for x, norm, p in zip(tokens, self.norms, self.projections, strict=True)]
        return self.logit(silu(self.mix(torch.cat(each, 1))))[:, 0]


class GanReference(Reference):
    """Blocks of width 24, whose outputs the head reads; generated and real samples pass one after the other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokens: dict[nn.Module, list[Tensor]] = defaultdict(list)
        gan, seed = self.recipe.objective.gan, self.recipe.run.seed
        networks = self.fake_score.items() if isinstance(self.fake_score, nn.ModuleDict) else [("", self.fake_score)]
        for name, network in networks:
            head = PlainHead(len(network.blocks), 24, gan.width)
            for key, p in head.named_parameters():
                drawn = rng.normal(p.shape, seed, f"init/{name}{'.' * bool(name)}head.{key}")
                constant = torch.ones_like(p) if "norms" in key and key.endswith("weight") else torch.zeros_like(p)
                p.data = constant if p.ndim == 1 else drawn / p.shape[1] ** 0.5
            for block in network.blocks:
                block.register_forward_hook(lambda _, __, out, network=network: self.tokens[network].append(out))
            network.head = head
        self.optimizers["fake_score"] = self._adamw("fake_score")
        [group] = self.optimizers["fake_score"].param_groups
        of_head = [p for name, p in self.fake_score.named_parameters() if "head." in name]
        group["params"] = [p for name, p in self.fake_score.named_parameters() if "head." not in name]
        self.optimizers["fake_score"].add_param_group({"params": of_head, "lr": group["lr"] * gan.lr_ratio})

    def judge(self, x: Tensor, sigma: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        self.tokens.clear()
        velocity = self.velocity(self.fake_score, x, sigma, batch.prompt_embeds)
        [(network, tokens)] = self.tokens.items()
        if not self.recipe.objective.gan.trains_blocks and self.training_fake:
            tokens = [x.detach() for x in tokens]
        return velocity, network.head(tokens)

    def dmd2_loss(self, batch: Batch, x_g: Tensor) -> Tensor:
        self.training_fake = False
        x, sigma, _ = self.renoise(x_g, batch, "generator", 0)
        _, logit = self.judge(x, sigma, batch)
        return super().dmd2_loss(batch, x_g) + self.recipe.objective.gan.weight.at(0) * softplus(-logit).mean()

    def fake_loss(self, batch: Batch, x_g: Tensor, update: int) -> Tensor:
        self.training_fake, gan = True, self.recipe.objective.gan
        x, sigma, noise = self.renoise(x_g, batch, "fake", update)
        velocity, generated = self.judge(x, sigma, batch)
        s = sigma[:, None, None, None, None]
        real = (1 - s) * batch.latents.float() + s * self.noise("real/noise", batch, update)
        _, logit = self.judge(real, sigma, batch)
        loss = softplus(generated) + softplus(-logit)
        if gan.r1_weight.at(0) > 0:
            _, other = self.judge(real + gan.r1_std * self.noise("real/r1", batch, update), sigma, batch)
            loss = loss + gan.r1_weight.at(0) * (other - logit) ** 2 / gan.r1_std**2
        return ((velocity - (noise - x_g)) ** 2).mean() + gan.fake_weight.at(0) * loss.mean()
