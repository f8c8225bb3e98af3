"""A plain single-process trainer, written from the method's formulas without the project's objectives or roles.

It shares with the project only the random draws, the order of the data and diffusers' network.
"""

from __future__ import annotations

from dataclasses import dataclass

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from sgmd_dist import rng
from sgmd_dist.batch import Batch
from sgmd_dist.data.index import ShardIndex
from sgmd_dist.data.stream import Stream
from sgmd_dist.recipe import Recipe

SIGMAS = (1.0, 0.9375, 5 / 6, 0.625, 0.0)
BOUNDARY = 0.875  # of a pipeline with two transformers


@dataclass
class Reference:
    """Three unsharded networks, two torch optimizers, one loop."""

    recipe: Recipe

    def __post_init__(self) -> None:
        self.teacher = self.network().requires_grad_(False)
        self.generator = self.network()
        self.fake_score = self.network()
        self.place = (0, 0)  # of the current micro-batch: step and unit
        self.ema = {name: p.detach().clone() for name, p in self.generator.named_parameters()}
        self.optimizers = {"generator": self._adamw("generator"), "fake_score": self._adamw("fake_score")}
        data = self.recipe.data
        self.stream = Stream(
            ShardIndex.open(data.shards), seed=self.recipe.run.seed, micro_batch_size=data.micro_batch_size,
            lanes=data.lanes, window=data.window, text_tokens=self.recipe.model.text_tokens,
        )  # fmt: skip
        self.num_units = data.global_batch_size // data.micro_batch_size

    def network(self) -> torch.nn.Module:
        """A pipeline's transformer, or both by name."""
        folder = Path(self.recipe.model.pretrained)
        high = WanTransformer3DModel.from_pretrained(folder / "transformer")
        if not (folder / "transformer_2").exists():
            return high
        low = WanTransformer3DModel.from_pretrained(folder / "transformer_2")
        return torch.nn.ModuleDict({"high": high, "low": low})

    def _adamw(self, name: str) -> torch.optim.AdamW:
        section = getattr(self.recipe.optim, name)
        return torch.optim.AdamW(
            getattr(self, name).parameters(), lr=section.lr.at(0), betas=section.betas, eps=section.eps,
            weight_decay=section.weight_decay,
        )  # fmt: skip

    def train(self) -> dict[str, dict[str, Tensor]]:
        for step in range(self.recipe.run.steps):
            self.step(step)
        self.stream.close()
        networks = {"generator": self.generator, "fake_score": self.fake_score}
        state = {name: {k: p.detach() for k, p in m.named_parameters()} for name, m in networks.items()}
        return {**state, "generator.ema": self.ema}

    def step(self, step: int) -> None:
        objective, batches, samples = self.recipe.objective, [], []
        for unit in range(self.num_units):
            batch, self.place = self.stream.next(), (step, unit)
            x_g, extra = self.rollout(batch, step, unit, "rollout", 0)
            loss = getattr(self, f"{objective.name}_loss")(batch, x_g) + extra
            (loss / self.num_units).backward()
            batches.append(batch)
            samples.append(x_g.detach())
        self.fake_score.zero_grad()
        self.update("generator", self.generator)
        decay = self.recipe.optim.ema.decay.at(step)
        for name, p in self.generator.named_parameters():
            self.ema[name] = decay * self.ema[name] + (1 - decay) * p.detach()
        for update in range(round(objective.fake_updates.at(step))):
            for unit in range(self.num_units):
                batch, x_g, self.place = batches[unit], samples[unit], (step, unit)
                if objective.inner_sample == "fresh":
                    batch = self.stream.next()
                    with torch.no_grad():
                        x_g, _ = self.rollout(batch, step, unit, "fake_rollout", update)
                (self.fake_loss(batch, x_g, update) / self.num_units).backward()
            self.update("fake_score", self.fake_score)

    def update(self, name: str, network: torch.nn.Module) -> None:
        torch.nn.utils.clip_grad_norm_(network.parameters(), self.recipe.optim.max_grad_norm.at(0))
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()

    def velocity(self, network: torch.nn.Module, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        if isinstance(network, torch.nn.ModuleDict):
            [name] = {"high" if s >= BOUNDARY else "low" for s in sigma.tolist()}
            network = network[name]
        return network(x, 1000 * sigma, text.float(), return_dict=False)[0]

    def guided_velocity(self, x: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            positive = self.velocity(self.teacher, x, sigma, batch.prompt_embeds)
            negative = self.velocity(self.teacher, x, sigma, batch.negative_embeds.expand_as(batch.prompt_embeds))
        return negative + self.recipe.objective.guidance_scale.at(0) * (positive - negative)

    def noise(self, purpose: str, batch: Batch, *counters: int) -> Tensor:
        seed = self.recipe.run.seed
        return rng.sample_normal(batch.latent_shape, seed, purpose, batch.ids, *counters, device="cpu")

    def rollout(self, batch: Batch, step: int, unit: int, purpose: str, update: int) -> tuple[Tensor, Tensor]:
        objective = self.recipe.objective
        weight = objective.diversity.weight.at(step) if objective.name == "sgmd" else 0.0
        first, group = int(weight > 0), unit * objective.exit_groups // self.num_units
        seed = self.recipe.run.seed
        exit_index = first + rng.integer(4 - first, seed, f"{purpose}/exit", step, group, update)
        counters = () if purpose == "rollout" else (update,)
        x = noise = self.noise(purpose, batch, *counters)
        extra = torch.zeros(())
        if weight and purpose == "rollout":
            one = torch.ones(batch.size)
            extra = (
                weight
                * ((self.velocity(self.generator, x, one, batch.prompt_embeds) - self.pull(noise, batch)) ** 2).mean()
            )
        for i in range(exit_index):
            with torch.no_grad():
                v = self.velocity(self.generator, x, torch.full((batch.size,), SIGMAS[i]), batch.prompt_embeds)
                x = x + (SIGMAS[i + 1] - SIGMAS[i]) * v
        sigma = torch.full((batch.size,), SIGMAS[exit_index])
        return x - SIGMAS[exit_index] * self.velocity(self.generator, x, sigma, batch.prompt_embeds), extra

    def pull(self, noise: Tensor, batch: Batch) -> Tensor:
        times = [1 - i / 30 for i in range(6)]
        sigmas = [5 * t / (1 + 4 * t) for t in times]
        x = noise
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            x = x + (following - sigma) * self.guided_velocity(x, torch.full((batch.size,), sigma), batch)
        return (noise - x) / (1 - sigmas[-1])

    def renoise(self, x_g: Tensor, batch: Batch, purpose: str, update: int) -> tuple[Tensor, Tensor, Tensor]:
        u = [rng.uniform(self.recipe.run.seed, f"{purpose}/sigma", i.epoch, i.unit, i.index, update) for i in batch.ids]
        levels = self.levels(purpose, update)
        t = [levels[int(len(levels) * value)] for value in u]
        sigma = torch.tensor([min(max(5 * value / (1 + 4 * value), 0.02), 0.98) for value in t])
        noise = self.noise(f"{purpose}/noise", batch, update)
        s = sigma[:, None, None, None, None]
        return (1 - s) * x_g + s * noise, sigma, noise

    def levels(self, purpose: str, update: int) -> list[float]:
        """The times that a micro-batch draws from: all thousand, or those of the transformer that is drawn first."""
        times = [i / 1000 for i in range(1, 1001)]
        if not isinstance(self.teacher, torch.nn.ModuleDict):
            return times
        step, unit = self.place
        group = unit * self.recipe.objective.exit_groups // self.num_units
        drawn = times[rng.integer(1000, self.recipe.run.seed, f"{purpose}/expert", step, group, update)]
        return [t for t in times if (5 * t / (1 + 4 * t) >= BOUNDARY) == (5 * drawn / (1 + 4 * drawn) >= BOUNDARY)]

    def predictions(self, x: Tensor, sigma: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        s = sigma[:, None, None, None, None]
        f_fake = x - s * self.velocity(self.fake_score, x, sigma, batch.prompt_embeds)
        return f_fake, x.detach() - s * self.guided_velocity(x.detach(), sigma, batch)

    def sgmd_loss(self, batch: Batch, x_g: Tensor) -> Tensor:
        x, sigma, _ = self.renoise(x_g, batch, "generator", 0)
        f_fake, f_teacher = self.predictions(x, sigma, batch)
        n = (x_g.detach() - f_teacher).abs().mean((1, 2, 3, 4), keepdim=True)
        fisher = (0.5 * (f_fake - f_teacher) ** 2 / (n + 1e-8)).mean()
        residual = (f_fake - x_g).detach() / sigma[:, None, None, None, None]
        nr = 0.5 * ((f_fake - (f_fake - residual).detach()) ** 2).mean()
        return fisher - self.recipe.objective.nr_weight.at(0) * nr

    def dmd2_loss(self, batch: Batch, x_g: Tensor) -> Tensor:
        with torch.no_grad():
            x, sigma, _ = self.renoise(x_g, batch, "generator", 0)
            f_fake, f_teacher = self.predictions(x, sigma, batch)
            n = (x_g - f_teacher).abs().mean((1, 2, 3, 4), keepdim=True)
            target = x_g - (f_fake - f_teacher) / n
        return 0.5 * ((x_g - target) ** 2).mean()

    def sid_loss(self, batch: Batch, x_g: Tensor) -> Tensor:
        return self.identity_loss(batch, x_g, self.recipe.objective.alpha.at(0))

    def sim_loss(self, batch: Batch, x_g: Tensor) -> Tensor:
        return self.identity_loss(batch, x_g, None)

    def identity_loss(self, batch: Batch, x_g: Tensor, alpha: float | None) -> Tensor:
        """SiD's with its alpha, or SIM's; the teacher's input has the graph too."""
        x, sigma, _ = self.renoise(x_g, batch, "generator", 0)
        s = sigma[:, None, None, None, None]
        f_fake = x - s * self.velocity(self.fake_score, x, sigma, batch.prompt_embeds)
        f_teacher = x - s * self.guided_velocity(x, sigma, batch)
        delta, n = f_teacher - f_fake, (x_g - f_teacher).detach().abs().mean((1, 2, 3, 4), keepdim=True) + 1e-8
        if alpha is not None:
            return ((1 - alpha) * delta**2 / n + delta * (f_fake - x_g) / n).mean()
        c = self.recipe.objective.huber_c.at(0) * delta[0].numel() ** 0.5
        norm = (delta**2).sum((1, 2, 3, 4), keepdim=True)
        return (c * delta / torch.sqrt(norm + c**2) * (f_fake - x_g) / n).mean()

    def fake_loss(self, batch: Batch, x_g: Tensor, update: int) -> Tensor:
        x, sigma, noise = self.renoise(x_g, batch, "fake", update)
        error = ((self.velocity(self.fake_score, x, sigma, batch.prompt_embeds) - (noise - x_g)) ** 2).mean()
        return 0.5 * error if self.recipe.objective.name == "sgmd" else error
