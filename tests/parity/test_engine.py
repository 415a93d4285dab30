"""What vLLM computes with our plugin against the same model in plain torch and transformers.

Two models: a small random one with the hub's geometry and an expert in the released format, and
nano with its convolutional tower. One run of vLLM for each, both in one process.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from looktwice_adapters.shipped import CHECKOUT_MODELS
from tests.parity.engine import compute
from tests.parity.hub_checkpoint import expert_state, spread_scores, write_model
from tests.parity.pictures import draw
from tests.parity.reference import HIGHLY, MODERATELY, SLIGHTLY, Reference, Seen

TOLERANCE = 1e-4
TEXT = "<|im_start|>user\n<image>Is anything wrong?<|im_end|>\n<|im_start|>assistant\n"
NANO = CHECKOUT_MODELS / "nano"
# (width, height, seed); with the hub's pinpoints the last three have 12, 18 and 36 crops.
HUB_PICTURES = [
    (384, 384, 0),
    (500, 300, 1),
    (28, 200, 2),
    (700, 1100, 3),
    (1500, 333, 4),
    (640, 640, 5),
    (1047, 1270, 6),
    (2300, 1100, 7),
    (2304, 2304, 8),
]
NANO_PICTURES = [
    (224, 224, 0),
    (640, 480, 1),
    (300, 900, 2),
    (64, 1000, 3),
    (1500, 200, 4),
    (1200, 1201, 5),
    (30, 40, 6),
    (500, 230, 7),
    (448, 448, 8),
]


class Case:
    """One model: its files, the reference, and what the reference sees."""

    def __init__(self, folder: Path, expert: Path | None, reference: Reference, pictures) -> None:
        self.folder, self.expert, self.reference = folder, expert, reference
        self.pictures = pictures
        self.seen: list[Seen] = []

    def spread(self, state: dict) -> None:
        """Give the pictures all three adverbs, and look at them."""
        scale_of = [self.reference.see(draw(*picture)).logit for picture in self.pictures]
        spread_scores(state, scale_of)
        self.reference.expert.state.update({name: value.float() for name, value in state.items()})
        self.seen = [self.reference.see(draw(*picture)) for picture in self.pictures]


def hub_case(folder: Path) -> Case:
    write_model(folder, tokenizer_of=NANO)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    phrases = [
        tokenizer.encode(f" with {adverb} suspicious features: ", add_special_tokens=False)
        for adverb in ("slightly", "moderately", "highly")
    ]
    state, expert = expert_state(), folder.parent / "pretrained_expert.pth"
    torch.save(state, expert)
    case = Case(folder, expert, Reference(folder, expert, None, phrases), HUB_PICTURES)
    case.spread(state)
    torch.save(state, expert)
    return case


def nano_case(folder: Path) -> Case:
    shutil.copytree(NANO, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["anomaly_expert"]["calibration"]  # it scores with the map; here the head is compared
    (folder / "config.json").write_text(json.dumps(config))
    case = Case(folder, None, Reference.of_folder(folder), NANO_PICTURES)
    state = load_file(folder / "expert.safetensors")
    case.spread(state)
    save_file(state, folder / "expert.safetensors")
    return case


@pytest.fixture(scope="module")
def one_thread():
    """On a busy machine torch's threads wait for each other longer than one alone needs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cases(tmp_path_factory, one_thread) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("parity")
    return {"hub": hub_case(folder / "hub"), "nano": nano_case(folder / "nano")}


@pytest.fixture(scope="module")
def computed(cases, tmp_path_factory) -> dict[str, list[dict]]:
    """What vLLM computed for each case's pictures."""
    folder = tmp_path_factory.mktemp("engine")
    task = {
        name: {
            "folder": str(case.folder),
            "expert": case.expert and str(case.expert),
            "dtype": "float32",
            "text": TEXT,
            "pictures": case.pictures,
        }
        for name, case in cases.items()
    }
    torch.save(task, folder / "task.pt")
    return compute(folder / "task.pt")


@pytest.fixture(params=["hub", "nano"])
def name(request) -> str:
    return request.param


@pytest.fixture
def pairs(name, cases, computed) -> list[tuple[Seen, dict]]:
    """What the reference and vLLM make of each picture."""
    return list(zip(cases[name].seen, computed[name], strict=True))


def check(what: str, pairs: list[tuple[torch.Tensor, torch.Tensor]], tolerance: float) -> None:
    """Compare ours with theirs and print the figure that docs/parity.md quotes."""
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
    worst = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
    largest = max(theirs.abs().max().item() for _, theirs in pairs)
    print(f"{what}: largest difference {worst:.1e}, largest value {largest:.2f}")
    assert worst < tolerance


def test_pictures_cover_all_three_adverbs_and_more_than_nine_crops(cases):
    for case in cases.values():
        assert {seen.adverb for seen in case.seen} == {SLIGHTLY, MODERATELY, HIGHLY}
    grids = [seen.grid for seen in cases["hub"].seen]
    assert sum(rows * columns > 9 for rows, columns in grids) >= 3
    assert (6, 6) in grids
    assert {seen.grid for seen in cases["nano"].seen} == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_scores_equal_the_references(name, pairs):
    scores = [(torch.tensor(ours["score"]), torch.tensor(seen.score)) for seen, ours in pairs]
    # The head of nano is stretched until all adverbs occur, and rounding with it.
    check(f"{name}, score", scores, 1e-5 if name == "hub" else 1e-4)


def test_maps_equal_the_references(name, pairs):
    maps = [(ours["significance"], seen.significance) for seen, ours in pairs]
    assert max(theirs.std() for _, theirs in maps) > 0.01  # not flat: errors would hide
    check(f"{name}, significance", maps, TOLERANCE)


def test_embeddings_equal_the_references_for_every_size(name, pairs):
    embeddings = [(ours["embeddings"], seen.embeddings) for seen, ours in pairs]
    check(f"{name}, embeddings", embeddings, TOLERANCE)


def test_logits_at_every_place_equal_the_references_for_every_size(name, pairs, cases):
    reference, logits = cases[name].reference, []
    for seen, ours in pairs:
        prompt = reference.prompt(TEXT, [seen.embeddings])
        places = reference.logits(torch.cat((prompt, reference.embed(ours["answer"]))))
        before, after = places[: len(prompt) - 1], places[len(prompt) - 1 : -1]
        following = torch.tensor(ours["prompt_ids"][1:])
        logits.append((ours["follows"], before.gather(1, following[:, None])[:, 0]))
        logits.append((ours["logits"], after))
        assert ours["answer"] == after.argmax(-1).tolist()
    check(f"{name}, logits", logits, TOLERANCE)
