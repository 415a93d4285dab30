"""How far bfloat16, in which checkpoints are served by default, is from float32.

    python benchmarks/precision.py [--pictures 24]

Both models of the parity tests, on the same weights: vLLM in bfloat16 against plain torch and
transformers in float32. Prints the table of docs/parity.md.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the suite's reference

from tests.parity.engine import compute
from tests.parity.pictures import draw
from tests.parity.reference import Seen
from tests.parity.test_engine import TEXT, Case, hub_case, nano_case

LARGEST = {"nano": 900, "hub": 1500}  # pixels a side


def pictures(count: int, largest: int) -> list[tuple[int, int, int]]:
    """Width, height and seed of pictures of many sizes."""
    sides = np.exp(np.random.default_rng(1).uniform(np.log(40), np.log(largest), (count, 2)))
    return [(int(w), int(h), seed) for seed, (w, h) in enumerate(sides)]


def distances(case: Case, seen: Seen, ours: dict) -> dict[str, float]:
    """One picture, served in bfloat16, against the float32 reference."""
    prompt = case.reference.prompt(TEXT, [seen.embeddings])
    logits = case.reference.logits(prompt)[-1]
    difference = (ours["significance"] - seen.significance).abs()
    adverb = (ours["score"] >= 0.3) + (ours["score"] >= 0.7)
    return {
        "raw score": abs(ours["score"] - seen.score),
        "significance, mean": difference.mean().item(),
        "significance, largest": difference.max().item(),
        "embeddings, relative": (
            (ours["embeddings"] - seen.embeddings).norm() / seen.embeddings.norm()
        ).item(),
        "logits of the first token, largest": (ours["logits"][0] - logits).abs().max().item(),
        "another adverb": float(adverb != seen.adverb),
        "another first token": float(ours["answer"][0] != logits.argmax().item()),
    }


def measure(count: int) -> None:
    """Run both models and print a row for each figure."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cases = {"nano": nano_case(folder / "nano"), "hub": hub_case(folder / "hub")}
        task = {}
        for name, case in cases.items():
            case.pictures = pictures(count, LARGEST[name])
            case.seen = [case.reference.see(draw(*picture)) for picture in case.pictures]
            task[name] = {
                "folder": str(case.folder),
                "expert": case.expert and str(case.expert),
                "dtype": "bfloat16",
                "text": TEXT,
                "pictures": case.pictures,
            }
        torch.save(task, folder / "task.pt")
        computed = compute(folder / "task.pt")
    print("| model | figure | median | largest |\n|---|---|---|---|")
    for name, case in cases.items():
        rows = [distances(case, *pair) for pair in zip(case.seen, computed[name], strict=True)]
        for figure in rows[0]:
            values = [row[figure] for row in rows]
            if figure.startswith("another"):
                print(f"| {name} | {figure} | | {sum(values):.0f} of {count} pictures |")
            else:
                print(
                    f"| {name} | {figure} | {statistics.median(values):.1e} | {max(values):.1e} |"
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=24)
    torch.set_num_threads(1)
    measure(parser.parse_args().pictures)
