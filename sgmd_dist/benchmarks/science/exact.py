"""Gaussian mixtures under rectified flow: exact velocities, and networks that start from them.

A mixture x0 ~ sum_k w_k N(mu_k, C) with one covariance C = V diag(lambda) Vᵀ has, with a = 1 - sigma, at
x_sigma = a x0 + sigma eps the marginal sum_k w_k N(a mu_k, a² C + sigma² I). In the coordinates y = Vᵀ x_sigma
everything but the choice of the component is diagonal, s² = a² lambda + sigma²:

    r_k proportional to w_k exp( (a / s² y)ᵀ mu_k - ½ (a² / s²)ᵀ mu_k² )      the component's probability at x_sigma
    m = sum_k r_k mu_k
    E[x0 | x_sigma] = m + a lambda / s² (y - a m)
    velocity = (x_sigma - E[x0 | x_sigma]) / sigma = ( (sigma - a lambda) y - sigma m ) / s²

The last form divides by no noise level: it is exact at sigma = 0 too, where it is -x_sigma (arXiv 2210.02747 gives the
velocity of the marginal as the conditional expectation of that of the samples).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor, nn

from sgmd_dist import rng
from sgmd_dist.batch import Batch
from sgmd_dist.benchmarks.science import scores
from sgmd_dist.conditions import Condition, text_of
from sgmd_dist.distances import energy_distance, sliced_wasserstein
from sgmd_dist.models.base import ImageInput, LatentShape, RunnableModel
from sgmd_dist.rng import SampleId
from sgmd_dist.rollout import guided, sample

HIDDEN = 128
NUM_FREQUENCIES = 4  # of the noise level, 1/2 to 4 turns over [0, 1]
WEIGHTS_SEED = 0
DATA_SEED = 0
EXCLUDED = -1e9  # the logarithm of a weight of zero: finite, since it is multiplied with the zeros of other prompts
TEACHER_STEPS = 200
TEACHER_SHIFT = 2.0


class Mixture(nn.Module):
    """A Gaussian mixture whose weights depend on the prompt, in float32.

    Args:
        means: `[K, D]`.
        covariance: `[D, D]`, positive definite, of every component.
        weights: `[P, K]`, for every prompt a distribution over the components.

    A prompt p is handed over as row p of the identity, `[B, 1, P]`; zeros stand for no prompt, which is all of them
    with equal probability.
    """

    means: Tensor
    covariance: Tensor
    weights: Tensor
    _basis: Tensor
    _variances: Tensor
    _rotated_means: Tensor
    _half_squares: Tensor
    _log_weights: Tensor
    _log_weights_by_prompt: Tensor

    def __init__(self, means: Tensor, covariance: Tensor, weights: Tensor) -> None:
        super().__init__()
        variances, basis = torch.linalg.eigh(covariance.double())
        rotated = means.double() @ basis
        unprompted = weights.double().mean(0).log()
        buffers = {
            "means": means,
            "covariance": covariance,
            "weights": weights,
            "_basis": basis,
            "_variances": variances,
            "_rotated_means": rotated,
            "_half_squares": rotated.square() / 2,
            "_log_weights": unprompted,
            "_log_weights_by_prompt": weights.double().log().clamp_min(EXCLUDED) - unprompted,
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.float())

    @property
    def num_prompts(self) -> int:
        return len(self.weights)

    def prompt_embeds(self, prompts: Tensor) -> Tensor:
        """Embeddings `[B, 1, P]` of prompt numbers `[B]`."""
        return torch.eye(self.num_prompts)[prompts][:, None]

    def velocity(self, x_sigma: Tensor, sigma: Tensor, prompt_embeds: Tensor) -> Tensor:
        """E[eps - x0 | x_sigma] without guidance, `[B, D]`, for sigma in [0, 1].

        Args:
            x_sigma: `[B, D]`; the graph through it is kept.
            sigma: `[B]`.
            prompt_embeds: `[B, 1, P]`.
        """
        return self.velocities(x_sigma, sigma, [prompt_embeds])[0]

    def velocities(self, x_sigma: Tensor, sigma: Tensor, prompts: Sequence[Tensor]) -> list[Tensor]:
        """`velocity` at the same points for several prompts, whose embeddings are `[B, 1, P]` each."""
        sigma = sigma[:, None].to(self.means.dtype)
        clean = 1 - sigma
        precision = 1 / (clean**2 * self._variances + sigma**2)
        y = x_sigma @ self._basis
        logits = (y * (clean * precision)) @ self._rotated_means.T - (clean**2 * precision) @ self._half_squares.T
        without_mean = (sigma - clean * self._variances) * y
        velocities = []
        for embeds in prompts:
            log_weights = torch.addmm(self._log_weights, embeds[:, 0], self._log_weights_by_prompt)
            mean = (logits + log_weights).softmax(1) @ self._rotated_means
            velocities.append(((without_mean - sigma * mean) * precision) @ self._basis.T)
        return velocities

    def posterior_mean(self, x_sigma: Tensor, sigma: Tensor, prompt_embeds: Tensor) -> Tensor:
        """E[x0 | x_sigma], `[B, D]`; see `velocity`."""
        return x_sigma - sigma[:, None] * self.velocity(x_sigma, sigma, prompt_embeds)

    def draw(self, prompts: Tensor, u: Tensor, noise: Tensor) -> Tensor:
        """Samples `[B, D]` for prompt numbers `[B]` from uniform draws `[B]` in [0, 1) and normal ones `[B, D]`."""
        thresholds = self.weights[prompts].double().cumsum(1)
        component = torch.searchsorted(thresholds, u[:, None].double(), right=True)[:, 0]
        allowed = (self.weights[prompts] > 0).double()  # rounding must not lead to an excluded component
        last = allowed.shape[1] - 1 - allowed.flip(1).argmax(1)
        return self.means[torch.minimum(component, last)] + (noise * self._variances.sqrt()) @ self._basis.T


class ExactNetwork(nn.Module):
    """The mixture's velocity without guidance, and a learnable correction that starts at zero.

    The correction is a perceptron that sees x_sigma, the exact velocity with the prompt and without, the noise level
    and the prompt: a network that starts from a teacher's weights has what the teacher knows.
    """

    _frequencies: Tensor

    def __init__(self, mixture: Mixture, num_layers: int = 2) -> None:
        super().__init__()
        self.mixture = mixture
        dim = mixture.means.shape[1]
        sizes = [3 * dim + 2 * NUM_FREQUENCIES + mixture.num_prompts, *[HIDDEN] * num_layers, dim]
        hidden = [layer for pair in pairwise(sizes[:-1]) for layer in (nn.Linear(*pair), nn.SiLU())]
        last = nn.Linear(sizes[-2], sizes[-1])
        self.correction = nn.Sequential(*hidden, last)
        self.register_buffer("_frequencies", math.pi * 2.0 ** torch.arange(NUM_FREQUENCIES))
        with torch.no_grad():
            for name, parameter in self.correction.named_parameters():
                parameter.copy_(_initial_value(name, parameter))
            last.weight.zero_()

    def forward(self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Velocity `[B, C, F, H, W]` at latents of that shape; sigma `[B]`, prompt_embeds `[B, 1, P]`."""
        x = latents.flatten(1)
        no_prompt = torch.zeros_like(prompt_embeds)
        velocity, unprompted = self.mixture.velocities(x, sigma, [prompt_embeds, no_prompt])
        angles = sigma[:, None] * self._frequencies
        features = torch.cat([x, velocity, unprompted, angles.sin(), angles.cos(), prompt_embeds[:, 0]], 1)
        return (velocity + self.correction(features)).reshape(latents.shape)


class ExactTeacher(nn.Module):
    """The mixture's velocity without guidance, and nothing to learn."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor) -> Tensor:
        """As `ExactNetwork.forward`."""
        return self.mixture.velocity(latents.flatten(1), sigma, prompt_embeds).reshape(latents.shape)


def _initial_value(name: str, parameter: Tensor) -> Tensor:
    """Of a correction's parameter, a function of its name and shape: zero for biases."""
    if parameter.ndim == 1:
        return torch.zeros_like(parameter)
    return rng.normal(parameter.shape, WEIGHTS_SEED, f"init/{name}") / math.sqrt(parameter.shape[1])


class ExactModel:
    """How roles run the two networks."""

    boundaries: tuple[float, ...] = ()
    image_input: ImageInput | None = None

    def __init__(self, latent_shape: LatentShape, num_prompts: int) -> None:
        self._latent_shape = latent_shape
        self._num_prompts = num_prompts

    def velocity(
        self, module: nn.Module, latents: Tensor, sigma: Tensor, condition: Condition, level: float | None = None
    ) -> Tensor:
        """Run `ExactNetwork` or `ExactTeacher`."""
        return module(latents.float(), sigma, text_of(condition))

    def smallest_latents(self) -> LatentShape:
        """The world's own shape: a mixture has no other."""
        return self._latent_shape

    def text_dim(self) -> int:
        """One number a prompt."""
        return self._num_prompts


class MixtureWorld:
    """A world whose teacher is a mixture's exact velocity: all of `base.World`."""

    def __init__(
        self,
        name: str,
        latent_shape: LatentShape,
        mixture: Mixture,
        *,
        batch_size: int,
        guidance_scale: float,
        sigma_shift: float,
        num_samples: int,
    ) -> None:
        self.name = name
        self.latent_shape = latent_shape
        self.mixture = mixture
        self.batch_size = batch_size
        self.guidance_scale = guidance_scale
        self.sigma_shift = sigma_shift
        self.num_samples = self.num_reference = num_samples
        self._model = ExactModel(latent_shape, mixture.num_prompts)
        self._teacher_samples: dict[tuple[int, int], Tensor] = {}

    def networks(self) -> dict[str, tuple[nn.Module, RunnableModel]]:
        """New teacher, generator and fake_score; the latter two start as the teacher without guidance, exactly."""
        networks: dict[str, tuple[nn.Module, RunnableModel]] = {"teacher": (ExactTeacher(self.mixture), self._model)}
        for name in ("generator", "fake_score"):
            networks[name] = (ExactNetwork(self.mixture), self._model)
        return networks

    def batch(self, unit: int) -> Batch:
        """The training batch number `unit`, a pure function of it; its latents are the mixture's own samples.

        The prompts take turns.
        """
        ids = [SampleId(0, unit, i) for i in range(self.batch_size)]
        prompts = self._turns(self.batch_size)
        u = rng.sample_uniform(DATA_SEED, f"{self.name}/component", ids, device="cpu")
        noise = rng.normal((self.batch_size, self.mixture.means.shape[1]), DATA_SEED, f"{self.name}/latents", unit)
        embeds, negative = self.prompts(self.batch_size)
        return Batch(
            ids=ids,
            keys=[f"{unit}/{i}" for i in range(self.batch_size)],
            latent_shape=self.latent_shape,
            prompt_embeds=embeds,
            negative_embeds=negative,
            latents=self.mixture.draw(prompts, u, noise).reshape(-1, *self.latent_shape),
            valid=torch.ones(self.batch_size, dtype=torch.bool),
        )

    def prompts(self, count: int) -> tuple[Tensor, Tensor]:
        """Embeddings `[count, 1, P]`, in which the P prompts take turns, and the negative one `[1, 1, P]`, zeros."""
        return self.mixture.prompt_embeds(self._turns(count)), torch.zeros(1, 1, self.mixture.num_prompts)

    def teacher_samples(self, count: int, seed: int) -> Tensor:
        """Samples `[count, C, F, H, W]` of the guided teacher for `prompts(count)`; kept in memory."""
        if (count, seed) not in self._teacher_samples:
            noise = rng.normal((count, *self.latent_shape), seed, f"{self.name}/teacher_samples")
            embeds, negative = self.prompts(count)

            def exact(x: Tensor, sigma: Tensor, condition: Condition, level: float) -> Tensor:
                return self.mixture.velocity(x.flatten(1), sigma, text_of(condition)).reshape(x.shape)

            velocity = guided(exact, embeds, negative, self.guidance_scale)
            self._teacher_samples[count, seed] = sample(velocity, noise, TEACHER_STEPS, TEACHER_SHIFT)
        return self._teacher_samples[count, seed]

    def by_prompt(self, samples: Tensor) -> list[Tensor]:
        """Samples for `prompts(N)` `[N, ...]`, as a list over the prompts."""
        return [samples[prompt :: self.mixture.num_prompts] for prompt in range(self.mixture.num_prompts)]

    def _turns(self, count: int) -> Tensor:
        return torch.arange(count) % self.mixture.num_prompts

    def score(self, samples: Tensor, reference: Tensor) -> dict[str, float]:
        """Scores of samples for `prompts(N)` against the guided teacher's, `[N, C, F, H, W]` both.

        swd: quadratic mean over the prompts of the sliced Wasserstein distances. energy_distance: mean over the
        prompts. mode_coverage, precision: by the modes of a sample's own prompt, mean over the prompts.
        """
        pairs = list(zip(self.by_prompt(samples.flatten(1)), self.by_prompt(reference.flatten(1)), strict=True))
        coverages, precisions = [], []
        for weights, sets in zip(self.mixture.weights, pairs, strict=True):
            means = self.mixture.means[weights > 0]
            found, wanted = (scores.nearest_modes(each, means, self.mixture.covariance) for each in sets)
            coverages.append(scores.mode_coverage(*found, *wanted))
            precisions.append(scores.precision(found[1]))
        return {
            "swd": scores.root_mean_square([sliced_wasserstein(a, b) for a, b in pairs]),
            "energy_distance": fmean(energy_distance(a, b) for a, b in pairs),
            "mode_coverage": fmean(coverages),
            "precision": fmean(precisions),
        }
