"""References: what adding and using them costs, on one machine, in one run.

    python benchmarks/references.py [--model nano] [--pictures 24]

A server is started with its store in a temporary folder; 0, 1, 16 and 256 references are asked in
turn, each time about a picture that nobody has seen. Then a million patches are searched in
process. Prints Markdown.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the suite's server and plates

from looktwice_adapters.memory_bank import SEARCH_BYTES, best_similarity
from looktwice_clients import Inspector
from tests.punched_plates import plate
from tests.serving import running_server

COUNTS = (0, 1, 16, 256)


def served(model: str, pictures: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log, store = Path(folder, "log"), Path(folder, "references")
        with (
            running_server(log, model, LOOKTWICE_REFERENCES=str(store)) as server,
            Inspector(server.url, max_retries=0) as inspector,
        ):
            print("| references | adding, s | patches | bank on disk, MB |\n|---|---|---|---|")
            for count in COUNTS[1:]:
                start = time.perf_counter()
                made = inspector.references.add(f"of-{count}", map(plate, range(count)))
                seconds = time.perf_counter() - start
                size = (store / "versions" / f"{made.version}.safetensors").stat().st_size
                print(
                    f"| {count} | {seconds:.1f} | {made.patches} | {size / 2**20:.1f} |", flush=True
                )
            times: dict[int, list[float]] = {count: [] for count in COUNTS}
            for number in range(pictures + 2):  # in turn, so that all see the same machine
                for count in COUNTS:
                    picture = plate(1000 + number * len(COUNTS) + count)
                    name = f"of-{count}" if count else None
                    start = time.perf_counter()
                    inspector.inspect(picture, name, map=False)
                    if number >= 2:  # the first ones load the bank
                        times[count].append(time.perf_counter() - start)
    print("\n| references | median inspection, ms | ratio to zero-shot |\n|---|---|---|")
    alone = statistics.median(times[0])
    for count, seconds in times.items():
        median = statistics.median(seconds)
        print(f"| {count} | {1000 * median:.0f} | {median / alone:.2f} |")


def million() -> None:
    """One picture's tokens against a million patches, in half precision."""
    bank = torch.nn.functional.normalize(torch.randn(10**6, 64), dim=-1).half()
    query = torch.nn.functional.normalize(torch.randn(980, 64), dim=-1)
    best_similarity(query, bank[:1000], SEARCH_BYTES)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    best_similarity(query, bank, SEARCH_BYTES)
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    print(
        f"\n980 tokens against 1,000,000 patches of 64 channels: {seconds:.1f} s; the process grew "
        f"by {max(grown, 0):.0f} MB (budget {SEARCH_BYTES / 2**20:.0f} MB; all similarities at "
        f"once: {980 * 10**6 * 4 / 2**30:.1f} GB)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pictures", type=int, default=24)
    options = parser.parse_args()
    served(options.model, options.pictures)
    million()
