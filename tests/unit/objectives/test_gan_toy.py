"""Points of a plane: a teacher that is wrong about the data, and a GAN term that moves the samples to the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgmd_dist import flow, heads, rng
from sgmd_dist.batch import Batch
from sgmd_dist.models.base import AttentionShape
from sgmd_dist.objectives import dmd2
from sgmd_dist.objectives.base import StepState
from sgmd_dist.recipe import OptimSection
from sgmd_dist.rng import SampleId
from sgmd_dist.roles import Roles, build_roles

SHAPE = (2, 1, 1, 1)
TEACHER, REAL, STD = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.3
SIZE, STEPS = 32, 150


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.outer(torch.nn.functional.silu(self.inner(tokens)))


class Points(nn.Module):
    """A velocity network on one token."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x: Tensor, sigma: Tensor) -> tuple[Tensor]:
        tokens = self.embed(torch.cat([x.flatten(1), sigma[:, None]], 1))[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        return (self.out(tokens[:, 0]).reshape(x.shape),)


class Exact(nn.Module):
    """The velocity of a Gaussian around `TEACHER`, in closed form."""

    def forward(self, x: Tensor, sigma: Tensor) -> tuple[Tensor]:
        s, mean = flow.expand(sigma, x), TEACHER.reshape(1, *SHAPE)
        gain = (1 - s) * STD**2 / ((1 - s) ** 2 * STD**2 + s**2)
        return (flow.velocity_from_x0(x, mean + gain * (x - (1 - s) * mean), sigma),)


class PointModel:
    """What heads and roles ask of a `VideoModel`."""

    boundaries = ()
    image_input = None

    def networks(self, module: nn.Module) -> list[nn.Module]:
        return [module]

    def blocks(self, network: Any) -> list[nn.Module]:
        return list(network.blocks)

    def attention_shape(self) -> AttentionShape:
        return AttentionShape(2, 1, 16)

    def num_tokens(self, latent_shape: tuple[int, ...]) -> int:
        return 1

    def velocity(self, module: nn.Module, x: Tensor, sigma: Tensor, text: Tensor, level: float | None) -> Tensor:
        return module(x, sigma)[0]


def make_roles(section: dmd2.Section) -> Roles:
    model: Any = PointModel()
    torch.manual_seed(0)
    modules: dict[str, Any] = {"teacher": (Exact(), model), "generator": (Points(), model)}
    fake = Points()
    fake.load_state_dict(modules["generator"][0].state_dict())
    if head := section.head_of("fake_score"):
        heads.inject(fake, model, head)
    modules["fake_score"] = (fake, model)
    adamw = {"lr": 3e-3, "betas": (0.0, 0.99), "weight_decay": 0.0}
    schedule = {"name": "cosine"}
    optim = OptimSection.model_validate({"generator": adamw, "fake_score": {**adamw, "lr": 1e-2}, "schedule": schedule})
    return build_roles(modules, {"generator", "fake_score"}, optim, STEPS, recomputes=False)


def batch_of(unit: int) -> Batch:
    ids = [SampleId(0, unit, i) for i in range(SIZE)]
    real = REAL + STD * rng.normal((SIZE, 2), 0, "real", unit)
    text, valid = torch.zeros(SIZE, 1, 1), torch.ones(SIZE, dtype=torch.bool)
    return Batch(ids, [str(i) for i in range(SIZE)], SHAPE, text, text[:1], real.reshape(SIZE, *SHAPE), valid)


def mean_after_training(gan: dict[str, Any]) -> Tensor:
    """The mean of the generator's samples, `[2]`."""
    keys = {"student_steps": 1, "guidance_scale": 1.0, "fake_updates": 2, "inner_sample": "reuse", "gan": gan}
    section = dmd2.Section.model_validate({"name": "dmd2", **keys})
    objective, roles = dmd2.build(section), make_roles(section)
    for step in range(STEPS):
        state, batch = StepState(step=step, seed=0, num_units=1), batch_of(step)
        for phase in objective.phases(step):
            roles.train_only(phase.role)
            phase.loss(roles, batch, state).per_sample.mean().backward()
            roles.step(phase.role, step)
    noise = rng.normal((512, *SHAPE), 1, "noise")
    with torch.no_grad():
        velocity = roles["generator"](noise, torch.ones(512), torch.zeros(512, 1, 1), 1.0)
    return (noise - velocity).flatten(1).mean(0)


@pytest.fixture(scope="module")
def without() -> Tensor:
    return mean_after_training({})


def test_without_the_gan_term_samples_go_where_the_teacher_is(without: Tensor) -> None:
    assert (without - TEACHER).norm() < 0.1 < 1.3 < (without - REAL).norm()


@pytest.mark.parametrize("trains_blocks", [True, False])
def test_the_gan_term_moves_samples_towards_the_real_latents(without: Tensor, trains_blocks: bool) -> None:
    gan = {"weight": 10.0, "fake_weight": 1.0, "r1_weight": 0.02, "width": 16, "trains_blocks": trains_blocks}
    mean = mean_after_training(gan)
    assert (mean - REAL).norm() < 0.5 * (without - REAL).norm()
