"""Run vLLM with our plugin on some pictures, in a process of its own, and keep what it computes.

    python -m tests.parity.engine TASK.pt RESULT.pt

TASK.pt: {name: {"folder", "expert", "dtype", "text", "pictures": [(width, height, seed)]}}.
RESULT.pt, under the same names: of each picture its embeddings, score and significance as the model
made them while it served the prompt, the logits of the generated tokens, and at each place of the
prompt the logit of the token that follows.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path

import torch

NEW_TOKENS = 4


def load(folder: str, expert: str | None, dtype: str):
    """A vLLM engine on a checkpoint, configured as `looktwice serve` does."""
    from vllm import LLM

    from looktwice_server.launch import expert_section
    from looktwice_server.plugin import ARCHITECTURE

    section = expert_section(folder, Path(expert) if expert else None, None)
    return LLM(
        folder,
        hf_overrides={"architectures": [ARCHITECTURE], "anomaly_expert": section},
        dtype=dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        max_num_seqs=2,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        limit_mm_per_prompt={"image": 1},
        disable_log_stats=True,
    )


def record_encoded(model) -> list:
    """Keep whatever the model encodes from now on."""
    kept, encode = [], model.encode

    def encode_and_keep(*arguments):
        encoded = encode(*arguments)
        kept.extend(encoded)
        return encoded

    model.encode = encode_and_keep
    return kept


def run(llm, text: str, pictures: list[tuple[int, int, int]]) -> list[dict]:
    """Each picture with the text, greedily."""
    from vllm import SamplingParams

    from tests.parity.pictures import draw

    [model] = llm.apply_model(lambda model: model)
    kept = record_encoded(model)
    sampling = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        logprobs=-1,
        prompt_logprobs=0,
        detokenize=False,
    )
    results = []
    for picture in pictures:
        request = {"prompt": text, "multi_modal_data": {"image": draw(*picture)}}
        [output] = llm.generate([request], sampling, use_tqdm=False)
        [image] = kept
        kept.clear()
        ids, answer = output.prompt_token_ids, output.outputs[0]
        steps = [
            torch.tensor([step[token].logprob for token in range(len(step))])
            for step in answer.logprobs
        ]
        follows = [
            place[token].logprob
            for token, place in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        ]
        results.append(
            {
                "embeddings": image.embeddings.float(),
                "score": image.score,
                "significance": image.significance,
                "prompt_ids": list(ids),
                "follows": torch.tensor(follows),  # (T - 1,)
                "answer": list(answer.token_ids),
                "logits": torch.stack(steps),  # (NEW_TOKENS, V)
            }
        )
    return results


def compute(task: Path) -> dict[str, list[dict]]:
    """The same in a new process, and its result."""
    result = task.with_name("result.pt")
    run = subprocess.run(
        [sys.executable, "-m", "tests.parity.engine", task, result],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(result)


def main(task: str, result: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    results = {}
    for name, work in torch.load(task).items():
        llm = load(work["folder"], work["expert"], work["dtype"])
        with torch.inference_mode():
            results[name] = run(llm, work["text"], work["pictures"])
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    torch.save(results, result)


if __name__ == "__main__":
    os.environ |= {
        "VLLM_PLUGINS": "looktwice",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    main(*sys.argv[1:])
