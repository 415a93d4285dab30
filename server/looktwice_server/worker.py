"""Worker extension: pictures' crops from the API side -> records, between two engine steps.

vLLM mixes the class into its worker (`--worker-extension-cls`). Nothing here raises on request
data: an exception would end the server for everybody.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from looktwice_adapters.few_shot import turns

logger = logging.getLogger(__name__)


class InspectionWorker:
    """Adds two remote procedures to vLLM's worker."""

    model_runner: Any  # vLLM's

    def looktwice_inspect(self, images: list[dict[str, Any]]) -> list[dict[str, Any]] | str:
        """Encode some images and keep their embeddings for the chat that follows.

        Args:
            images: of each its `key`, its `pixels` as bytes with `dtype` and `shape`, its `size`
                (height, width) and the version of its `reference`, if any.

        Returns:
            A record of each image, or one sentence that says why there is none. The record of an
            image whose reference is broken or gone holds `broken_reference`; where it only cannot
            be read now, `failed` with the reason.
        """
        model = self.model_runner.get_model()
        try:
            unread: dict[Any, dict[str, Any]] = {}
            references = []
            for image in images:
                try:
                    version = image["reference"]
                    references.append(version and model.references.get(version))
                except Exception as error:
                    logger.exception("reference version %s cannot be read", image["reference"])
                    unread[image["key"]] = _unread(error)
            whole = [image for image in images if image["key"] not in unread]
            encoded = model.encode(
                [self._on_device(image) for image in whole],
                [image["size"] for image in whole],
                references,
            )
            records = {
                image["key"]: model.inspect(image["key"], result)
                for image, result in zip(whole, encoded, strict=True)
            }
            records |= unread
            return [records[image["key"]] for image in images]
        except Exception as error:
            return _reason(error, len(images))

    def looktwice_look(
        self, image: dict[str, Any], turned: bool, grid: tuple[int, int] | None
    ) -> dict[str, Any] | str:
        """What a reference keeps of one picture; nothing is remembered here.

        Args:
            image: as for `looktwice_inspect`.
            turned: whether the tokens of turned and mirrored copies are wanted too.
            grid: that it shall be cut on; None is its own.

        Returns:
            `tokens` and `copies`, lists of bytes in float16 with their `shapes`, and `suspicion`
            in float32, or one sentence that says why there is none.
        """
        model = self.model_runner.get_model()
        try:
            pixels = model.cut(self._on_device(image), image["size"]).on(grid and tuple(grid))
            seen = model.look(pixels)
            copies = [model.look(copy).tokens for copy in turns(pixels)] if turned else []
            joined = [torch.cat(level) for level in zip(*copies, strict=True)]
            return {
                "suspicion": seen.suspicion.float().cpu().numpy().tobytes(),
                "grid": list(seen.suspicion.shape),
                "tokens": [_half(level) for level in seen.tokens],
                "copies": [_half(level) for level in joined],
            }
        except Exception as error:
            return _reason(error, 1)

    def _on_device(self, image: dict[str, Any]) -> Tensor:
        """The crops of an image where the model is."""
        return _tensor(image).to(self.model_runner.get_model().image_newline.device)


def _unread(error: Exception) -> dict[str, Any]:
    """The record of an image whose reference could not be had."""
    gone = isinstance(error, FileNotFoundError)
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, OSError) and not gone):
        return {"failed": "the reference cannot be read now; try again later"}
    return {"broken_reference": True}


def _half(tokens: Tensor) -> tuple[list[int], bytes]:
    """Shape and bytes of tokens in half precision."""
    return list(tokens.shape), tokens.half().cpu().contiguous().numpy().tobytes()


def _reason(error: Exception, count: int) -> str:
    """Why some pictures could not be looked at, for the log and for the caller."""
    if isinstance(error, torch.OutOfMemoryError):
        logger.error("no memory to inspect %d pictures", count, exc_info=error)
        return "the server is out of memory for this picture now; try again later"
    logger.error("inspection of %d pictures failed", count, exc_info=error)
    return f"the worker could not inspect the picture: {type(error).__name__}"


def _tensor(image: dict[str, Any]) -> Tensor:
    """The crops of one image (B, 3, S, S)."""
    flat = torch.frombuffer(bytearray(image["pixels"]), dtype=getattr(torch, image["dtype"]))
    return flat.view(image["shape"])
