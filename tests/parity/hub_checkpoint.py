"""A small checkpoint with random weights in the hub's format, and an expert in the released one.

The geometry is that of the hub's 0.5B and 7B: crops of 384 pixels, 27 x 27 tokens, 1 x 1 to 6 x 6
crops, a tower of 26 layers tapped as published; only the widths are small.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

CHANNELS, EMBED = 32, 16
SIDES = range(384, 6 * 384 + 1, 384)
PINPOINTS = [[height, width] for height in SIDES for width in SIDES]
# As transformers names a tensor, and as the hub's files do.
NAMES = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def small_config(vocabulary: int, image_token: int, video_token: int) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        architectures=["LlavaOnevisionForConditionalGeneration"],
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": 384,
            "patch_size": 14,
            "hidden_size": CHANNELS,
            "intermediate_size": 48,
            "num_attention_heads": 1,
            "num_hidden_layers": 26,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": vocabulary,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 12_288,
            "tie_word_embeddings": False,
        },
        image_token_index=image_token,
        video_token_index=video_token,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


def draw_weights(model: LlavaOnevisionForConditionalGeneration, generator: torch.Generator) -> None:
    """Weights so large that layers differ: those of a fresh model hardly change their input."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:
                fan_in = value[0].numel()
                value.copy_(torch.randn(value.shape, generator=generator) * fan_in**-0.5)
            elif "norm" not in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)


def write_model(folder: Path, tokenizer_of: Path) -> None:
    """Write the LLaVA-OneVision part; tokenizer and processor files are another checkpoint's."""
    other = json.loads((tokenizer_of / "config.json").read_text())
    config = small_config(
        other["text_config"]["vocab_size"], other["image_token_index"], other["video_token_index"]
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    draw_weights(model, torch.Generator().manual_seed(3))
    folder.mkdir()
    tensors = {}
    for name, value in model.state_dict().items():
        prefix = next(prefix for prefix in NAMES if name.startswith(prefix))
        tensors[NAMES[prefix] + name.removeprefix(prefix)] = value.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_of / name, folder / name)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        edit(folder / name, size={"height": 384, "width": 384})
    edit(folder / "preprocessor_config.json", image_grid_pinpoints=PINPOINTS)
    edit(folder / "processor_config.json", num_image_tokens=27 * 27)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def expert_state() -> dict[str, Tensor]:
    """An expert of small sizes under the names of the released file."""
    sizes = {
        "positive_embedding": (1, EMBED),
        "negative_embedding": (1, EMBED),
        "pooling_layer.0": (1, 27 * 27),
        "class_predictor.0": (EMBED, CHANNELS),
        "class_predictor.2": (EMBED, EMBED),
        **{f"siglip_adaptors.{i}": (EMBED, CHANNELS) for i in range(4)},
        **{f"prompt_adaptors.{i}": (EMBED, 2 * EMBED) for i in range(4)},
        "final_predictor.0": (24, CHANNELS),
        "final_predictor.2": (1, 24),
        "q_former.query_proj": (20, CHANNELS),
        "q_former.key_proj": (20, CHANNELS),
    }
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, shape in sizes.items():
        value = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        if name.endswith("embedding"):
            state[name] = value
        else:
            state[f"{name}.weight"] = value
            state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    return state


def spread_scores(state: dict[str, Tensor], logits: list[float]) -> None:
    """Scale the head so that pictures with these logits get all three adverbs, in place."""
    ordered = sorted(logits)
    low, middle, high = ordered[1], ordered[len(ordered) // 2], ordered[-2]
    scale = 1.1 / min(middle - low, high - middle)  # sigmoid(+-1.1) = 0.75, 0.25
    state["final_predictor.2.weight"] *= scale
    state["final_predictor.2.bias"] = (state["final_predictor.2.bias"] - middle) * scale
