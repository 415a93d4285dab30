"""The worker's side of an inspection: a reference that cannot be had costs no other picture."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from looktwice_server.worker import InspectionWorker


class Model:
    """Sees each picture's first pixel; its references are what the test puts there."""

    image_newline = torch.zeros(1)

    def __init__(self, error: Exception) -> None:
        self.references = SimpleNamespace(get=self.get)
        self.error = error

    def get(self, version: str) -> None:
        raise self.error

    def encode(self, pixels: list[torch.Tensor], sizes: Any, references: Any) -> list[float]:
        return [float(crops.flatten()[0]) for crops in pixels]

    def inspect(self, key: str, result: float) -> dict[str, Any]:
        return {"score": result}


def image(key: str, reference: str | None) -> dict[str, Any]:
    pixels = torch.full((1, 3, 2, 2), float(key)).numpy().tobytes()
    return {
        **{"key": key, "pixels": pixels, "dtype": "float32", "shape": [1, 3, 2, 2]},
        **{"size": [2, 2], "reference": reference},
    }


@pytest.mark.parametrize(
    ("error", "record"),
    [
        (FileNotFoundError(2, "gone"), {"broken_reference": True}),
        (ValueError("not what was written"), {"broken_reference": True}),
        (OSError(116, "Stale file handle"), {"failed": "the reference cannot be read now; try"}),
        (torch.OutOfMemoryError("full"), {"failed": "the reference cannot be read now; try"}),
    ],
)
def test_a_reference_that_cannot_be_read_now_is_not_called_broken(
    error: Exception, record: dict[str, Any]
) -> None:
    worker = InspectionWorker()
    worker.model_runner = SimpleNamespace(get_model=lambda: Model(error))
    first, second = worker.looktwice_inspect([image("1", "v"), image("2", None)])
    assert first.keys() == record.keys()
    assert str(first).startswith(str(record)[:-2])
    assert second == {"score": 2.0}
