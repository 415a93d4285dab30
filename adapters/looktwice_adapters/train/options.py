"""A run's options: what it was made with and what one is asked for -> the names that differ.

And the options that several training commands take alike.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from zlib import crc32

import click
import numpy as np
from numpy.typing import NDArray
from torch import nn, uint8


def seed_option(of: str) -> Callable[[Any], Any]:
    """`--seed`, a whole number from 0 on; `of` says what it draws."""
    return click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help=of)


def calibrate_on_option(*, required: bool = False) -> Callable[[Any], Any]:
    """`--calibrate-on`, several data sets' folders."""
    return click.option(
        "--calibrate-on",
        multiple=True,
        required=required,
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="A data set that does not train, in any layout that `looktwice evaluate` reads, on "
        "whose test pictures threshold and scales are fitted; may be given several times.",
    )


def changed(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names whose values differ, or that only one side knows."""
    return [
        name
        for name in then | now
        if name not in then or name not in now or then[name] != now[name]
    ]


def content(arrays: Iterable[NDArray[Any]]) -> int:
    """Checksum of what some arrays hold: an input, wherever its file lies."""
    total = 0
    for array in arrays:
        total = crc32(np.ascontiguousarray(array).data, crc32(repr(array.shape).encode(), total))
    return total


def weights(network: nn.Module) -> int:
    """Checksum of a network's weights."""
    tensors = network.state_dict().values()
    return content(tensor.cpu().flatten().view(uint8).numpy() for tensor in tensors)
