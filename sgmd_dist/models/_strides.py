"""From the sizes of a video to those of its latents."""

from __future__ import annotations

from sgmd_dist.errors import UserError


def num_latents(name: str, size: int, stride: int, patch: int, *, lone_first: bool = False) -> int:
    """How many latents `size` frames or pixels become, in whole patches.

    Args:
        name: the key in `data.video`.
        stride: frames or pixels per latent.
        lone_first: the first latent holds one frame only.

    Raises:
        UserError: they make no whole latents and patches.
    """
    missing = stride - 1 if lone_first else 0
    unit = stride * patch
    count, rest = divmod(size + missing, unit)
    if rest or count == 0:
        form = f"{unit} n + {unit - missing}" if missing else f"a multiple of {unit}"
        nearest = " or ".join(str(unit * n - missing) for n in (count, count + 1) if n)
        raise UserError(
            f"data.video.{name} = {size}: expected {form} (VAE stride {stride}, patch size {patch}); nearest: {nearest}"
        )
    return count * patch
