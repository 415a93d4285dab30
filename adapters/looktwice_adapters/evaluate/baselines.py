"""Baselines: a name on the command line -> a judge, beside which ours stands in one table."""

import logging
import warnings
from collections.abc import Callable

from looktwice_adapters.evaluate.judge import Judge

RANDOM = "random"  # in place of weights: to try the code, never a result


class BaselineError(ValueError):
    """A baseline cannot run here, such as for want of its weights; the message says why."""


def first_line(error: Exception) -> str:
    """What a library's many-line error begins with."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def baseline(spec: str, seed: int) -> Judge:
    """The judge that a name such as `winclip:ViT-B-32@laion2b_s34b_b79k` asks for.

    Args:
        spec: a key of `BASELINES`, and behind a colon what it is made of.
        seed: of random weights and random choices.

    Raises:
        KeyError: there is no such baseline.
        BaselineError: there is, but it cannot run here.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every retry
    kind, _, argument = spec.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the libraries import from each other
        return BASELINES[kind](argument, seed)


def _clip(argument: str, seed: int) -> Judge:
    from looktwice_adapters.evaluate.clip import ClipJudge

    return ClipJudge(argument, seed, windows=False)


def _winclip(argument: str, seed: int) -> Judge:
    from looktwice_adapters.evaluate.clip import ClipJudge

    return ClipJudge(argument, seed, windows=True)


def _memory(argument: str, seed: int) -> Judge:
    from looktwice_adapters.evaluate.memory import MemoryJudge

    return MemoryJudge(argument)


def _patchcore(argument: str, seed: int) -> Judge:
    from looktwice_adapters.evaluate.patch_memory import PatchMemoryJudge

    return PatchMemoryJudge("PatchCore", argument, seed)


def _padim(argument: str, seed: int) -> Judge:
    from looktwice_adapters.evaluate.patch_memory import PatchMemoryJudge

    return PatchMemoryJudge("PaDiM", argument, seed)


def _vision_model(argument: str, seed: int) -> Judge:
    from looktwice_adapters.evaluate.vision_model import VisionModelJudge

    return VisionModelJudge(argument)


BASELINES: dict[str, Callable[[str, int], Judge]] = {
    "clip": _clip,
    "winclip": _winclip,
    "memory": _memory,
    "patchcore": _patchcore,
    "padim": _padim,
    "openai": _vision_model,
}
