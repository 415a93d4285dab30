"""Worker extension: pictures' crops from the API side -> records, between two engine steps.

vLLM mixes the class into its worker (`--worker-extension-cls`). Nothing here raises on request
data: an exception would end the server for everybody.
"""

import logging
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class InspectionWorker:
    """Adds one remote procedure to vLLM's worker."""

    model_runner: Any  # vLLM's

    def looktwice_inspect(self, images: list[dict[str, Any]]) -> list[dict[str, Any]] | str:
        """Encode some images and keep their embeddings for the chat that follows.

        Args:
            images: of each its `key`, its `pixels` as bytes with `dtype` and `shape`, and its
                `size` (height, width).

        Returns:
            A record of each image, or one sentence that says why there is none.
        """
        model = self.model_runner.get_model()
        device = model.image_newline.device
        try:
            encoded = model.encode(
                [_tensor(image).to(device) for image in images],
                [image["size"] for image in images],
            )
            return [
                model.inspect(image["key"], result)
                for image, result in zip(images, encoded, strict=True)
            ]
        except torch.OutOfMemoryError:
            logger.exception("no memory to inspect %d pictures", len(images))
            return "the server is out of memory for this picture now; try again later"
        except Exception as error:
            logger.exception("inspection of %d pictures failed", len(images))
            return f"the worker could not inspect the picture: {type(error).__name__}"


def _tensor(image: dict[str, Any]) -> Tensor:
    """The crops of one image (B, 3, S, S)."""
    flat = torch.frombuffer(bytearray(image["pixels"]), dtype=getattr(torch, image["dtype"]))
    return flat.view(image["shape"])
