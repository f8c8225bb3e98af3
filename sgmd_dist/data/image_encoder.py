"""The image encoder of an image-to-video pipeline: a video's first picture to the embeddings that shards store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from sgmd_dist.errors import UserError
from sgmd_dist.models.base import ImageInput

IMAGE_PARTS = ("image_encoder", "image_processor")


class ImageEncoder:
    """CLIP's vision model with its processor, of a diffusers folder (subfolders `IMAGE_PARTS`)."""

    def __init__(self, encoder: transformers.CLIPVisionModel, processor: Any) -> None:
        self._encoder: Any = encoder.eval().requires_grad_(False)
        self._processor = processor

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> ImageEncoder:
        """From local files only, in float32, as the Wan pipeline's card says.

        Raises:
            UserError: a part is missing or cannot be read.
        """
        for part in IMAGE_PARTS:
            if not (folder / part).is_dir():
                raise UserError(f"{folder / part}: no such folder, and the model's images need it; download it too")
        part = IMAGE_PARTS[0]
        try:
            loaded: Any = transformers.CLIPVisionModel.from_pretrained(
                folder / part, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
            encoder, report = loaded
            if missing := sorted(report["missing_keys"]):  # transformers would leave them random
                raise ValueError(f"{len(missing)} tensors are missing, as {missing[0]}")
            part = IMAGE_PARTS[1]
            processor = transformers.CLIPImageProcessor.from_pretrained(folder / part, local_files_only=True)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
            why = " ".join(str(error).split())[:300]
            raise UserError(
                f"{folder / part}: cannot be read as the image encoder's ({why}); an image-to-video model of this kind"
                " needs both; download the folder again"
            ) from error
        return cls(encoder.to(device), processor)

    @classmethod
    def of_input(cls, folder: Path, image: ImageInput, device: torch.device | str = "cpu") -> ImageEncoder | None:
        """The folder's, for a network that takes `image`; None for one that takes no embeddings.

        Raises:
            UserError: see `load`; or it is another network's.
        """
        if not image.embed_dim:
            return None
        encoder = cls.load(folder, device)
        if encoder.width != image.embed_dim:
            raise UserError(
                f"{folder / 'image_encoder'}: makes embeddings of {encoder.width} numbers, the transformer takes"
                f" {image.embed_dim}; download the folder again"
            )
        return encoder

    @property
    def width(self) -> int:
        """Numbers E of an embedding."""
        return int(self._encoder.config.hidden_size)

    @torch.no_grad()
    def encode(self, picture: Tensor) -> Tensor:
        """A picture uint8 `[H, W, 3]` -> embeddings float32 `[N, E]` on the CPU, before the last layer as in the
        pipeline."""
        pixels = self._processor(images=Image.fromarray(picture.numpy()), return_tensors="pt")
        output = self._encoder(**pixels.to(self._encoder.device), output_hidden_states=True)
        return output.hidden_states[-2][0].float().cpu()
