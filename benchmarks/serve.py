"""Ours against vLLM's stock LLaVA-OneVision: the same weights, one machine, one run.

    python benchmarks/serve.py [--model models/nano] [--pairs 30] [--json out/serve.json]
    python benchmarks/serve.py --model out/hub-size --expert out/pretrained_expert_05b.pth \
        --side 384 --first-token  # after benchmarks/hub_size.py

Both servers run side by side and are asked in turn, each time about a picture that neither has
seen, with prompts of the same number of tokens. vLLM's worker spins on its core for a second after
each call; that second is waited out, else it would be the other server's. Prints a table and writes
JSON.
"""

import argparse
import base64
import ctypes
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from openai import OpenAI
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, SiglipVisionModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # the suite's server

from looktwice_adapters.checkpoint import load_expert
from looktwice_adapters.expert import ExpertConfig
from looktwice_adapters.precision import has_bfloat16
from tests.serving import Server, running_server, stock_server

CONCURRENCY = (1, 8, 32)
ROUNDS = 3  # of each; the median counts
TOKENS = 32
SPIN_SECONDS = 1.2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
QUESTION = "Is there a defect in this picture, and where is it?"
_seeds = count()


def picture(side: int) -> str:
    """A picture that nobody has seen yet, as a data URI."""
    generator = np.random.default_rng(next(_seeds))
    ramp = np.linspace(60, 190, side)[None, :, None]
    pixels = np.clip(ramp + generator.normal(0, 12, (side, side, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def messages(uri: str, words: int = 0) -> list[dict[str, object]]:
    """One user turn about the picture; `words` lengthens the text by that many tokens."""
    image = {"type": "image_url", "image_url": {"url": uri}}
    return [
        {
            "role": "user",
            "content": [image, {"type": "text", "text": QUESTION + " the" * words}],
        }
    ]


class Chat:
    """One of the two servers, asked the way a client asks."""

    def __init__(self, server: Server, word: list[int]) -> None:
        """`word` is the id of a token that is text by itself: random weights say any bytes."""
        self.client = OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=600)
        self.model = self.client.models.list().data[0].id
        self.word, self.words = word, 0

    def complete(self, uri: str, tokens: int = TOKENS) -> int:
        """Generate exactly that many tokens; the prompt's number of tokens."""
        answer = self.client.chat.completions.create(
            model=self.model,
            messages=messages(uri, self.words),
            max_tokens=tokens,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return answer.usage.prompt_tokens

    def first_token_seconds(self, uri: str) -> float:
        """Time from the request to the first piece of text."""
        start = time.perf_counter()
        stream = self.client.chat.completions.create(
            model=self.model,
            messages=messages(uri, self.words),
            max_tokens=2,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "allowed_token_ids": self.word},
        )
        with stream:
            for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    return time.perf_counter() - start
        raise RuntimeError("the stream ended without a token")


def same_length(stock: Chat, ours: Chat, side: int) -> dict[str, int]:
    """Lengthen the stock prompt until both have the same number of tokens."""
    uri = picture(side)
    plain, with_prompt = stock.complete(uri, 1), ours.complete(uri, 1)
    stock.words = with_prompt - plain
    if stock.complete(picture(side), 1) != with_prompt:
        raise RuntimeError("the filler word is not one token in this tokenizer")
    return {"stock": plain, "ours": with_prompt}


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)}


def alternate(
    pictures: list[str], one: Callable[[str], float], other: Callable[[str], float], name: str
):
    """Medians of two measurements taken in turn, and the median of their ratios."""
    ones, others = [], []
    for turn, uri in enumerate(tqdm(pictures, desc=name, unit="pair")):
        order = ((one, ones), (other, others))
        for measure, into in order if turn % 2 else reversed(order):
            time.sleep(SPIN_SECONDS)
            into.append(measure(uri))
    ratios = [b / a for a, b in zip(ones, others, strict=True)]
    return {"first": spread(ones), "second": spread(others), "ratio": spread(ratios)}


def throughput(ask: Callable[[str], object], concurrency: int, uris: list[str]) -> float:
    """Requests a second with so many under way."""
    time.sleep(SPIN_SECONDS)
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(ask, uris))
    return len(uris) / (time.perf_counter() - start)


def alone(model: Path, dtype: str) -> Callable[[str], float]:
    """Image tower and expert in plain torch, one thread as the worker has: seconds a picture."""
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)  # what `looktwice serve` sets for its processes
    libc.mallopt(M_TRIM_THRESHOLD, 2**30)
    libc.mallopt(M_MMAP_THRESHOLD, 2**30)
    config = AutoConfig.from_pretrained(model)
    section = dict(config.anomaly_expert)
    weights = model / section.pop("weights")
    del section["phrase_token_ids"]
    expert = load_expert(weights, ExpertConfig.from_dict(section))
    tower = SiglipVisionModel(config.vision_config).eval().to(getattr(torch, dtype))
    processor = AutoImageProcessor.from_pretrained(model)

    @torch.inference_mode()
    def measure(uri: str) -> float:
        image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
        pixels = processor(image, return_tensors="pt")["pixel_values"][0]
        start = time.perf_counter()
        tokens = tower(pixels.to(tower.dtype)).last_hidden_state
        output = expert(*expert.tower(pixels), [len(pixels)])
        expert.suspicious_tokens(output, tokens.float(), [len(pixels)])
        return time.perf_counter() - start

    return measure


def inspect_with(server: Server) -> Callable[[str], float]:
    """`POST /v1/inspections`: seconds a picture."""
    client = httpx.Client(timeout=600)

    def measure(uri: str) -> float:
        start = time.perf_counter()
        client.post(f"{server.url}/inspections", json={"images": [uri]}).raise_for_status()
        return time.perf_counter() - start

    return measure


def memory(server: Server) -> dict[str, float]:
    """Peak resident memory in MB of each of a server's processes."""
    root = psutil.Process(server.process.pid)
    peaks = {}
    for member in [root, *root.children(recursive=True)]:
        status = Path(f"/proc/{member.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
        peaks[f"{status.split()[1]} {len(peaks)}"] = int(line.split()[1]) // 1024
    return peaks


@contextmanager
def both(
    model: Path, expert: Path | None, dtype: str, logs: Path
) -> Iterator[tuple[Server, Server, dict[str, float]]]:
    """The stock server and ours, and how long each took to start."""
    seconds = {}
    alike = ("--dtype", dtype, "--enforce-eager")  # what their defaults would not share
    flags = [*alike, *([] if expert is None else ["--expert", str(expert)])]
    with ExitStack() as stack:
        start = time.perf_counter()
        stock = stack.enter_context(stock_server(logs / "stock.log", model, *alike))
        seconds["stock"] = round(time.perf_counter() - start, 1)
        start = time.perf_counter()
        ours = stack.enter_context(running_server(logs / "ours.log", str(model), *flags))
        seconds["ours"] = round(time.perf_counter() - start, 1)
        yield stock, ours, seconds


def processor_name() -> str:
    """The processor, as Linux calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole run."""

    def pictures(number: int) -> list[str]:
        return [picture(arguments.side) for _ in range(number)]

    logs = arguments.json.parent
    chosen = arguments.model, arguments.expert, arguments.dtype
    with both(*chosen, logs) as (stock_server, our_server, start_seconds):
        word = AutoTokenizer.from_pretrained(arguments.model).encode("the")
        stock, ours = Chat(stock_server, word), Chat(our_server, word)
        for chat in (stock, ours):
            throughput(chat.complete, 2, pictures(4))  # warm
        report: dict[str, Any] = {
            "machine": f"{processor_name()}, {os.cpu_count()} cores, {arguments.dtype}",
            "start_seconds": start_seconds,
            "prompt_tokens": same_length(stock, ours, arguments.side),
            "first_token_seconds": alternate(
                pictures(arguments.pairs),
                stock.first_token_seconds,
                ours.first_token_seconds,
                "first token",
            ),
        }
        if not arguments.first_token:
            inspect = inspect_with(our_server)
            report["inspection_seconds"] = alternate(
                pictures(arguments.pairs),
                alone(arguments.model, arguments.dtype),
                inspect,
                "inspection",
            )
            asked = {"stock chat": stock.complete, "chat": ours.complete, "inspections": inspect}
            for concurrency in CONCURRENCY:
                rates: dict[str, list[float]] = {name: [] for name in asked}
                for _ in tqdm(range(ROUNDS), desc=f"{concurrency} at once", unit="round"):
                    for name, ask in asked.items():  # in turn, as all else
                        uris = pictures(16 + concurrency)
                        rates[name].append(throughput(ask, concurrency, uris))
                for name, found in rates.items():
                    medians = report.setdefault(f"{name}, requests/s", {})
                    medians[concurrency] = round(statistics.median(found), 2)
        report["peak_memory_mb"] = {"stock": memory(stock_server), "ours": memory(our_server)}
        return report


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["| measured | stock | ours | ratio |", "|---|---|---|---|"]
    tokens = report["prompt_tokens"]
    names = {
        "first_token_seconds": "time to first token, ms, median (quartiles), "
        f"{tokens['ours']} prompt tokens each ({tokens['ours'] - tokens['stock']} are ours)",
        "inspection_seconds": "`/v1/inspections`, ms, against tower + expert alone",
    }
    for key, name in names.items():
        if (pairs := report.get(key)) is not None:
            first, second = _cell(pairs["first"], 1000), _cell(pairs["second"], 1000)
            lines.append(f"| {name} | {first} | {second} | {_cell(pairs['ratio'], 1)} |")
    for concurrency in CONCURRENCY if "chat, requests/s" in report else ():
        stock, chat, inspections = (
            report[f"{name}, requests/s"][concurrency]
            for name in ("stock chat", "chat", "inspections")
        )
        lines.append(
            f"| chat with {TOKENS} tokens, requests/s, {concurrency} at once "
            f"| {stock} | {chat} | {stock / chat:.2f} |"
        )
        lines.append(
            f"| inspections/s against chats/s, {concurrency} at once "
            f"| | {inspections} against {chat} | {inspections / chat:.2f} |"
        )
    start = report["start_seconds"]
    lines.append(f"| start-up, s | {start['stock']} | {start['ours']} | |")
    for side in ("stock", "ours"):
        peaks = ", ".join(f"{mb:,}" for mb in report["peak_memory_mb"][side].values())
        lines.append(f"| peak memory of the processes, MB ({side}) | {peaks} | | |")
    return "\n".join(lines)


def _cell(values: dict[str, float], scale: float) -> str:
    digits = 0 if scale > 1 else 2
    q1, middle, q3 = (f"{values[key] * scale:.{digits}f}" for key in ("q1", "median", "q3"))
    return f"{middle} ({q1} to {q3})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "models/nano")
    parser.add_argument("--expert", type=Path, help="for a model that brings none")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--side", type=int, default=448, help="pixels of the pictures' sides")
    parser.add_argument(
        "--dtype",
        default="bfloat16" if has_bfloat16("cpu") else "float32",
        help="of both servers; default: bfloat16 where the processor has it, else float32",
    )
    parser.add_argument("--first-token", action="store_true", help="measure nothing else")
    parser.add_argument("--json", type=Path, default=Path("out/serve.json"))
    arguments = parser.parse_args()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    report = measure(arguments)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print(report["machine"], table(report), sep="\n\n")


if __name__ == "__main__":
    main()
