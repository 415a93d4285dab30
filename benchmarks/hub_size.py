"""A checkpoint with the hub's 0.5B configuration and random weights: built, served in bfloat16,
asked with a picture that fills a 6x6 grid of crops; time and peak memory of each process.

    python benchmarks/hub_size.py --folder out/hub-size

The real llava-hf/llava-onevision-qwen2-0.5b-ov-hf has these very sizes; its weights and its
tokenizer's merges are not needed to show that its size is served.
"""

import argparse
import base64
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from openai import OpenAI
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

sys.path.insert(0, str(Path(__file__).parents[1]))  # the suite's server and golden expert

from looktwice_adapters.train.nano import write_checkpoint
from tests.golden import make_expert_checkpoint
from tests.serving import running_server

NANO = Path(__file__).parents[1] / "models" / "nano"
SIDE = 384
PINPOINTS = [[rows * SIDE, columns * SIDE] for rows in range(1, 7) for columns in range(1, 7)]


def hub_config(tokenizer) -> LlavaOnevisionConfig:
    """The sizes of llava-onevision-qwen2-0.5b-ov-hf, with another tokenizer's special tokens."""
    return LlavaOnevisionConfig(
        architectures=["LlavaOnevisionForConditionalGeneration"],
        vision_config=SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=26,
            num_attention_heads=16,
            image_size=SIDE,
            patch_size=14,
            vision_use_head=False,
        ).to_dict(),
        text_config=Qwen2Config(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=152000,
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            tie_word_embeddings=True,
        ).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def build(folder: Path) -> Path:
    """Write the checkpoint and, beside it, an expert in the released format; its path."""
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlavaOnevisionForConditionalGeneration(hub_config(tokenizer))
    torch.set_default_dtype(torch.float32)
    write_checkpoint(model, tokenizer, folder, None)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        content = json.loads((folder / name).read_text())
        content["size"] = {"height": SIDE, "width": SIDE}
        if "image_grid_pinpoints" in content:
            content["image_grid_pinpoints"] = PINPOINTS
        (folder / name).write_text(json.dumps(content))
    expert = folder.parent / "pretrained_expert_05b.pth"
    torch.save(make_expert_checkpoint.checkpoint(), expert)
    return expert


def picture(side: int) -> str:
    """A reproducible picture of noise on a gradient, as a data URI."""
    noise = np.random.default_rng(0).normal(0, 20, (side, side, 3))
    ramp = np.linspace(40, 215, side)[:, None, None]
    buffer = io.BytesIO()
    pixels = np.clip(ramp + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def ask(client: OpenAI, uri: str) -> dict[str, object]:
    """One chat about the picture, timed."""
    start = time.perf_counter()
    part = {"type": "image_url", "image_url": {"url": uri}}
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[
            {"role": "user", "content": [part, {"type": "text", "text": "Is there a defect?"}]}
        ],
        max_tokens=8,
    )
    [inspection] = answer.model_extra["inspections"]
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "prompt_tokens": answer.usage.prompt_tokens,
        "score": inspection["score"],
        "severity": inspection["severity"],
    }


def peak_memory(process: psutil.Process) -> dict[str, float]:
    """Peak resident memory in GB of the server's processes."""
    peaks = {}
    for member in [process, *process.children(recursive=True)]:
        status = Path(f"/proc/{member.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
        peaks[f"{member.name()} {member.pid}"] = round(int(line.split()[1]) / 2**20, 2)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("out/hub-size"))
    parser.add_argument("--side", type=int, default=6 * SIDE, help="pixels of the picture's side")
    arguments = parser.parse_args()
    start = time.perf_counter()
    expert = arguments.folder.parent / "pretrained_expert_05b.pth"
    if not (arguments.folder / "config.json").exists() or not expert.exists():
        expert = build(arguments.folder)
    report: dict[str, object] = {"build_seconds": round(time.perf_counter() - start, 1)}
    log = arguments.folder / "server.log"
    flags = [
        str(arguments.folder), "--expert", str(expert), "--dtype", "bfloat16", "--enforce-eager",
        "--max-model-len", "16384",
    ]  # fmt: skip
    start = time.perf_counter()
    with running_server(log, *flags) as server:
        report["start_seconds"] = round(time.perf_counter() - start, 1)
        client = OpenAI(base_url=server.url, api_key="none", timeout=1800, max_retries=0)
        report["first"] = ask(client, picture(arguments.side))
        report["again"] = ask(client, picture(arguments.side))
        report["small"] = ask(client, picture(SIDE))
        report["peak_memory_gb"] = peak_memory(psutil.Process(server.process.pid))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
