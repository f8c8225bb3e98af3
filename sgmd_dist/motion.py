"""Motion of videos, from their latents `[N, C, F, H, W]`; pure functions.

`latent_motion` reads any video. `velocity`, `speed` and `jitter` follow the one moving thing of a video on a torus
(what leaves on one side comes back on the other), as the moving-shapes world has it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def latent_motion(latents: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring frames, `[N]` float32; 0 for an image.

    Cheap and free of assumptions, so it serves any model's latents; it cannot tell motion from flicker.
    """
    if latents.shape[2] < 2:
        return torch.zeros(len(latents), device=latents.device)
    latents = latents.detach().float()
    return (latents[:, :, 1:] - latents[:, :, :-1]).abs().flatten(1).mean(dim=1)


def velocity(latents: Tensor) -> Tensor:
    """Mean velocity (x, y) in pixels per frame of the moving thing: `[N, 2]` float64, x to the right, y down.

    The energy's first Fourier harmonic along an axis is a phasor whose phase is the thing's place on the torus. The
    phasors' turns from frame to frame are averaged as complex numbers, weighted with their length: a uniform noise
    floor cancels, frames in which nothing is localized hardly count, and trembling around a place averages out.
    Unambiguous below half the frame per step.
    """
    energy = latents.double().square().sum(dim=1)  # [N, F, H, W]
    return torch.stack([_phase_velocity(energy.sum(dim=2)), _phase_velocity(energy.sum(dim=3))], dim=1)


def place(images: Tensor) -> Tensor:
    """Where the thing in each image `[N, C, H, W]` is: (x, y) in pixels, `[N, 2]` float64; see `velocity`."""
    energy = images.double().square().sum(dim=1)  # [N, H, W]
    profiles = (energy.sum(dim=1), energy.sum(dim=2))
    return torch.stack([torch.angle(_phasor(x)) * x.shape[-1] / (2 * math.pi) for x in profiles], dim=1)


def _phasor(profile: Tensor) -> Tensor:
    """The first Fourier harmonic over the last axis of energy profiles `[..., size]`, complex `[...]`."""
    size = profile.shape[-1]
    angles = torch.arange(size, dtype=profile.dtype, device=profile.device) * (2 * math.pi / size)
    return (profile * torch.exp(1j * angles)).sum(dim=-1)


def _phase_velocity(profile: Tensor) -> Tensor:
    """Pixels per frame `[N]` from energy profiles `[N, F, size]` along one axis."""
    size = profile.shape[-1]
    phasor = _phasor(profile)  # [N, F]
    turns = (phasor[:, 1:] * phasor[:, :-1].conj()).sum(dim=1)
    return torch.angle(turns) * size / (2 * math.pi)


def speed(latents: Tensor) -> Tensor:
    """Speed of the moving thing in pixels per frame, `[N]` float64: the length of `velocity`."""
    return velocity(latents).norm(dim=1)


def jitter(latents: Tensor) -> Tensor:
    """Share of a video's amplitude that is not one rigid picture in constant motion: `[N]` float64 in [0, 1].

    Every frame is shifted back by the fitted constant velocity (exactly, in the Fourier domain of the torus); what
    then still changes over time is flicker, deformation, noise or uneven motion. Second differences of the pixels,
    the usual measure, would grow with the speed itself and so reward a generator that stands still. Returned is the
    root of (variance over time / energy): about 0 for samples of the world, 1 for independent frames.
    """
    still = _shift_back(latents.double(), velocity(latents))
    wobble = (still - still.mean(dim=2, keepdim=True)).square().flatten(1).mean(dim=1)
    return (wobble / latents.double().square().flatten(1).mean(dim=1).clamp_min(1e-12)).sqrt()


def _shift_back(latents: Tensor, velocities: Tensor) -> Tensor:
    """Shift frame f of each video by -f times its velocity `[N, 2]` (x, y), periodically."""
    num_frames, height, width = latents.shape[2:]
    options = {"dtype": latents.dtype, "device": latents.device}
    frames = torch.arange(num_frames, **options)
    moved = velocities[:, :, None] * frames  # [N, 2, F] pixels
    turn_x = moved[:, 0, :, None] * torch.fft.fftfreq(width, **options)  # [N, F, W]
    turn_y = moved[:, 1, :, None] * torch.fft.fftfreq(height, **options)
    phase = torch.exp(2j * math.pi * (turn_y[:, :, :, None] + turn_x[:, :, None, :]))
    return torch.fft.ifft2(torch.fft.fft2(latents) * phase[:, None]).real
