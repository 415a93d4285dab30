"""Do the words agree with the facts? Asks a running server about pictures, with and without facts.

    looktwice serve &
    python benchmarks/agreement.py DATASET_DIR... [--images 100] [--url URL]

Of every picture: is "yes" or "no" in the answer what the verdict says, and where the verdict is
anomalous, is the place named first the top region's position? Pictures are drawn evenly from the
`test` folders of the datasets, by seed; labels are not looked at.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from looktwice_adapters.answers import place_named, said_yes
from looktwice_clients import Inspector

WHETHER = "Is there a defect in this picture?"
WHERE = "Where is the defect?"
SUFFIXES = {".jpg", ".jpeg", ".png"}


def pictures(folders: list[Path], total: int, seed: int) -> list[Path]:
    """As many pictures of each folder's tests as evenly as they go."""
    generator = random.Random(seed)
    pools = []
    for folder in folders:
        pool = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in SUFFIXES and "test" in path.relative_to(folder).parts
        )
        generator.shuffle(pool)
        pools.append(pool)
    drawn: list[Path] = []
    while len(drawn) < total and any(pools):
        drawn += [pool.pop() for pool in pools if pool]
    return drawn[:total]


def agreement(inspector: Inspector, paths: list[Path], *, grounding: bool) -> dict[str, object]:
    """Shares of answers that agree with the inspection beside them."""
    counts: Counter[str] = Counter()
    wrong = []
    for path in tqdm(paths, desc="with facts" if grounding else "without facts", unit="picture"):
        answer = inspector.ask(path, WHETHER, grounding=grounding, temperature=0)
        [inspection] = answer.inspections
        counts["asked"] += 1
        if said_yes(answer.text) == inspection.anomalous:
            counts["whether"] += 1
        else:
            wrong.append((path.name, inspection.verdict, answer.text))
        if inspection.anomalous:
            where = inspector.ask(path, WHERE, grounding=grounding, temperature=0).text
            counts["anomalous"] += 1
            if place_named(where) == inspection.regions[0].position:
                counts["where"] += 1
            else:
                wrong.append((path.name, inspection.regions[0].position, where))
    return {
        "pictures": counts["asked"],
        "yes_no_agrees": round(counts["whether"] / counts["asked"], 3),
        "anomalous_verdicts": counts["anomalous"],
        "place_agrees": round(counts["where"] / max(1, counts["anomalous"]), 3),
        "examples_that_do_not": wrong[:5],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url")
    arguments = parser.parse_args()
    paths = pictures(arguments.folders, arguments.images, arguments.seed)
    with Inspector(arguments.url) as inspector:
        report = {
            name: agreement(inspector, paths, grounding=grounding)
            for name, grounding in (("grounding", True), ("no grounding", False))
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
