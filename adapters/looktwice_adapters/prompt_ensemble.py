"""Prompt ensembles: words for intact and for damaged things -> two text features (2, E).

AnomalyGPT (AAAI 2024), after WinCLIP's "compositional prompt ensemble" (Jeong et al., CVPR 2023):
every state in every template, averaged a class. The texts, and the word "object" for any product,
are the released code's. The features are computed once, by open_clip's text tower, and
stored with the decoder; open_clip is not needed to serve.
"""

from collections.abc import Callable
from pickle import UnpicklingError

import torch
from torch import Tensor
from torch.nn.functional import normalize

NORMAL = (
    *("{}", "flawless {}", "perfect {}", "unblemished {}"),
    *("{} without flaw", "{} without defect", "{} without damage"),
)
ABNORMAL = ("damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage")
TEMPLATES = ("a photo of a {}.", "a photo of the {}.")
PRODUCT = "object"

EncodeText = Callable[[list[str]], Tensor]  # texts -> (T, E), of any length


class TextTowerError(ValueError):
    """open_clip has no such text tower, or cannot get its weights."""


def prompts(states: tuple[str, ...], product: str = PRODUCT) -> list[str]:
    """Every state of the product in every template."""
    return [template.format(state.format(product)) for state in states for template in TEMPLATES]


@torch.no_grad()
def text_features(encode: EncodeText, product: str = PRODUCT) -> Tensor:
    """Mean features of the normal and of the abnormal prompts: (2, E), float32, of unit length."""
    means = [
        normalize(encode(prompts(states, product)).float(), dim=-1).mean(0)
        for states in (NORMAL, ABNORMAL)
    ]
    return normalize(torch.stack(means), dim=-1)


def open_clip_encoder(name: str, weights: str | None) -> EncodeText:
    """The text tower of one of open_clip's architectures.

    Args:
        name: such as `ViT-B-32`.
        weights: one of open_clip's tags, or a file; None: untrained, the same on every call.

    Raises:
        ModuleNotFoundError: open_clip is not installed (extra `clip`).
        TextTowerError: it has no such architecture or weights, or cannot get them.
    """
    import open_clip

    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = open_clip.create_model(name, pretrained=weights).eval()
    except (RuntimeError, OSError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise TextTowerError(f"no text tower {name} with weights {weights}: {reason}") from error
    tokenize = open_clip.get_tokenizer(name)
    return lambda texts: model.encode_text(tokenize(texts))
