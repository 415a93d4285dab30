"""vLLM's options with inspections: the same picture and questions, with each option in turn.

    python benchmarks/vllm_options.py

Each option starts a server of its own (about a minute on two cores). "works": score, verdict and
regions are those of the server without options, and so are the answers, word for word.
"""

import sys
import tempfile
from pathlib import Path

from looktwice_clients import Inspector

sys.path.insert(0, str(Path(__file__).parents[1]))  # the suite's server

from tests.serving import running_server

PICTURE = Path(__file__).parents[1] / "examples" / "scratched.png"
QUESTIONS = ("Is there a defect?", "Where is it?")
OPTIONS = (
    "",
    "--dtype bfloat16",
    "--dtype float32",
    "--api-server-count 2",
    "--data-parallel-size 2",
    "--kv-cache-dtype fp8",
    "--no-enable-prefix-caching",
    "--max-num-batched-tokens 1024 --enable-chunked-prefill",
    '--speculative-config {"method":"ngram","num_speculative_tokens":3,"prompt_lookup_max":3}',
    "--tensor-parallel-size 2",
    "--quantization fp8",
)


def answers(flags: str) -> tuple[float, tuple[object, ...]]:
    """The score, and what must be the same: verdict, places and the answers' words."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        store = str(Path(folder) / "references")
        with (
            running_server(log, "nano", *flags.split(), LOOKTWICE_REFERENCES=store) as server,
            Inspector(server.url, timeout=600) as inspector,
        ):
            found = inspector.inspect(PICTURE)
            words = [inspector.ask(PICTURE, question).text for question in QUESTIONS]
    return found.score, (found.verdict, found.places(), *words)


def main() -> None:
    """Print a line for each option."""
    score, told = answers(OPTIONS[0])
    print(f"plain: score {score:.4f}, {told}", flush=True)
    for flags in OPTIONS[1:]:
        try:
            other, said = answers(flags)
        except RuntimeError as error:
            print(f"{flags}: does not start: {str(error).splitlines()[-1]}", flush=True)
            continue
        same = said == told and abs(other - score) < 1e-3
        print(f"{flags}: {'works' if same else f'differs: {said}'}, score {other:.4f}", flush=True)


if __name__ == "__main__":
    main()
