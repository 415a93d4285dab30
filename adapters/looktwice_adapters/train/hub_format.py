"""The hub's format: a LLaVA-OneVision model and its tokenizer -> a folder of files.

With the hub's file and tensor names stock vLLM and stock transformers load it; the expert lies
beside the weights in a file of its own, and config.json has one more section for it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from looktwice_adapters.checkpoint import file_sha256
from looktwice_adapters.train.draft import draft_of
from looktwice_adapters.train.tokenizer import phrase_token_ids, save_tokenizer
from looktwice_adapters.train.tower import TowerTraining

PINPOINTS = [[224, 224], [224, 448], [448, 224], [448, 448]]  # (height, width), 2x2 crops at most
CONTEXT = 4096
# Names in transformers' model -> names in checkpoints on the hub, first match wins.
HUB_NAMES = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}
TIED = "lm_head.weight"


def language_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """The language model: 5.5 million parameters, heads of 64 (a size that vLLM's CPU knows)."""
    return Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )


def nano_config(
    tokenizer: PreTrainedTokenizerFast, tower: SiglipVisionConfig | None = None
) -> LlavaOnevisionConfig:
    """The checkpoint's configuration, without the expert's section."""
    return LlavaOnevisionConfig(
        architectures=["LlavaOnevisionForConditionalGeneration"],
        vision_config=(tower or TowerTraining().siglip()).to_dict(),
        text_config=language_config(tokenizer).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def hub_state_dict(
    model: LlavaOnevisionForConditionalGeneration, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """The model's tensors under the hub's names; a tied head is left out."""
    named = {}
    for name, value in model.state_dict().items():
        if name == TIED and model.config.tie_word_embeddings:
            continue
        prefix = next(prefix for prefix in HUB_NAMES if name.startswith(prefix))
        renamed = HUB_NAMES[prefix] + name.removeprefix(prefix)
        named[renamed] = value.detach().to(dtype).contiguous().clone()
    return named


def read_checkpoint(
    folder: Path,
) -> tuple[LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast]:
    """A small checkpoint's LLaVA-OneVision part in float32, and its tokenizer."""
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder)
    return model.float(), PreTrainedTokenizerFast.from_pretrained(folder)


def expert_section(expert: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """`anomaly_expert` of config.json: the expert's own section and what the server adds to it."""
    section: dict[str, Any] = json.loads(expert.with_suffix(".json").read_text())
    return section | {
        "weights": expert.name,
        "phrase_token_ids": phrase_token_ids(tokenizer),
    }


def image_processor_config() -> dict[str, Any]:
    """preprocessor_config.json: AnyRes crops of 224 pixels, SigLIP's normalisation."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": PINPOINTS,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "LlavaOnevisionProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": 224, "width": 224},
    }


def video_processor_config() -> dict[str, Any]:
    """video_preprocessor_config.json: the stock processor needs one, though videos are not used."""
    config = image_processor_config()
    del config["image_grid_pinpoints"], config["image_processor_type"]
    return config | {"video_processor_type": "LlavaOnevisionVideoProcessor", "do_pad": False}


def processor_config(tower: SiglipVisionConfig) -> dict[str, Any]:
    """processor_config.json: how many tokens a crop has."""
    return {
        "image_token": "<image>",
        "num_image_tokens": (tower.image_size // tower.patch_size) ** 2,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>",
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_select_strategy": "full",
    }


def generation_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """generation_config.json: greedy, so that a client without wishes of its own gets the facts."""
    return {
        "do_sample": False,
        "temperature": 0.0,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "max_new_tokens": 256,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as people read it; an interruption leaves the old file whole."""
    with draft_of(path) as draft:
        draft.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write model.safetensors and its index.

    The index keeps stock vLLM from taking the expert's file beside it for a part of the model.
    """
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(tensors, path.name)}
    write_json(folder / "model.safetensors.index.json", index)


def write_hashes(folder: Path) -> None:
    """Write SHA256SUMS of the folder's weights, for `sha256sum -c` and `looktwice doctor`."""
    weights = sorted(folder.glob("*.safetensors"))
    lines = [f"{file_sha256(path)}  {path.name}\n" for path in weights]
    (folder / "SHA256SUMS").write_text("".join(lines))


def write_checkpoint(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    expert: Path | None,
) -> None:
    """Write every file of the checkpoint's folder but the expert's own two, which lie there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(hub_state_dict(model), folder)
    config = model.config.to_diff_dict()
    if expert is not None:
        config["anomaly_expert"] = expert_section(expert, tokenizer)
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", image_processor_config())
    write_json(folder / "video_preprocessor_config.json", video_processor_config())
    write_json(folder / "processor_config.json", processor_config(model.config.vision_config))
    write_json(folder / "generation_config.json", generation_config(tokenizer))
    save_tokenizer(tokenizer, folder)
    write_hashes(folder)
