"""References: what adding and using them costs, on one machine, in one run.

    python benchmarks/references.py [--model nano] [--pictures 24] [--in-process]

First in process, the expert alone, in processor time of one thread: making a reference of 16,
judging pictures with 0, 1 and 16, a million patches. Then through a server with its store in a
temporary folder: 0, 1, 16 and 256 references are asked in turn, each time about a picture that
nobody has seen. Prints Markdown.
"""

import argparse
import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the suite's server and plates

from looktwice_adapters.detector import Detector
from looktwice_adapters.few_shot import Reference, build
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
            print(
                "| references | adding, s | patches | bank, MB | file, MB |\n|---|---|---|---|---|"
            )
            for count in COUNTS[1:]:
                start = time.perf_counter()
                made = inspector.references.add(f"of-{count}", map(plate, range(count)))
                seconds = time.perf_counter() - start
                file = store / "versions" / f"{made.version}.safetensors"
                bank = Reference.read(file).bank.nbytes / 2**20
                print(
                    f"| {count} | {seconds:.1f} | {made.patches} | {bank:.1f} | "
                    f"{file.stat().st_size / 2**20:.1f} |",
                    flush=True,
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


def in_process(folder: Path, pictures: int) -> None:
    """The expert's own time, without server and language model."""
    torch.set_num_threads(1)
    detector = Detector.from_folder(folder)
    looked = [detector.look(np.array(plate(seed))) for seed in range(16)]
    start = time.process_time()
    prior = detector.expert.config.calibration.normal_scores
    references = {
        0: None,
        1: build(looked[:1], prior=prior).reference,
        16: build(looked, prior=prior).reference,
    }
    print(f"bank, coreset and leave-one-out of 16 pictures: {time.process_time() - start:.1f} s\n")
    times: dict[int, list[float]] = {count: [] for count in references}
    for number in range(pictures):
        picture = np.array(plate(1000 + number))
        for count, reference in references.items():
            start = time.process_time()
            detector.judge(picture, reference)
            times[count].append(time.process_time() - start)
    print("| references | bank, MB | median, ms of one core | ratio to zero-shot |")
    print("|---|---|---|---|")
    for count, seconds in times.items():
        reference = references[count]
        bank = "" if reference is None else f"{reference.bank.nbytes / 2**20:.1f}"
        median = statistics.median(seconds)
        ratio = median / statistics.median(times[0])
        print(f"| {count} | {bank} | {1000 * median:.0f} | {ratio:.2f} |", flush=True)


def peak_memory() -> int:
    """The most memory that this process has had, in MB; `getrusage` would count its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmHWM")]
    return int(line.split()[1]) // 2**10


def million() -> None:
    """One picture's tokens against a million patches, in half precision, in a process of its own.

    A process that has needed more memory before would not grow by what the search needs.
    """
    torch.set_num_threads(1)
    bank = torch.empty(10**6, 64, dtype=torch.half)
    for block in bank.split(10**4):  # the peak of the process must be the search's
        block.copy_(torch.nn.functional.normalize(torch.randn(len(block), 64), dim=-1))
    query = torch.nn.functional.normalize(torch.randn(980, 64), dim=-1)
    best_similarity(query, bank[:1000], SEARCH_BYTES)
    before = peak_memory()
    start = time.process_time()
    best_similarity(query, bank, SEARCH_BYTES)
    seconds = time.process_time() - start
    grown = peak_memory() - before
    print(
        f"\n980 tokens against 1,000,000 patches of 64 channels ({bank.nbytes / 2**20:.0f} MB): "
        f"{seconds:.1f} s; the process grew "
        f"by {grown:.0f} MB (budget {SEARCH_BYTES / 2**20:.0f} MB; all similarities at "
        f"once: {980 * 10**6 * 4 / 2**30:.1f} GB)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--in-process", action="store_true", help="leave out the server")
    options = parser.parse_args()
    in_process(Path("models", options.model), options.pictures)
    with get_context("spawn").Pool(1) as pool:
        pool.apply(million)
    if not options.in_process:
        served(options.model, options.pictures)
