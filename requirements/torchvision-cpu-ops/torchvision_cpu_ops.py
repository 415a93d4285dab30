"""Declare the two operators that `import torchvision` needs, where its C++ extension cannot load.

A CPU torch beside the stock torchvision wheel (built against CUDA) is such a pair. PyTorch
calls `declare` in every process through its documented `torch.backends` entry point.
"""

import importlib.util
from pathlib import Path

_libraries = []  # torch forgets the schemas when the library object is collected


def declare() -> None:
    """Load torchvision's own operators; declare `nms` and `qnms` only where that fails."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        for extension in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(extension))
            return
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
