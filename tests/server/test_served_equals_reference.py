"""What the server answers equals the same model in plain torch and transformers, in float32.

Scores to 1e-5, maps to 1e-4 (and half a grey level, where they come as PNG), greedy answers word
for word: one at a time and together, from caches and after they lost it, streamed and not.
"""

import base64
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

import httpx
import numpy as np
import pytest
import torch
from openai import OpenAI
from PIL import Image

from looktwice_adapters.anomaly_map import Region, find_regions, stitch
from looktwice_adapters.shipped import CHECKOUT_MODELS
from tests.parity.pictures import draw
from tests.parity.reference import Reference, Seen

NANO = CHECKOUT_MODELS / "nano"
QUESTION = "Is there a defect in this picture, and where?"
TOKENS = 24
SCORE, MAP, GREY, LOG_PROBABILITY = 1e-5, 1e-4, 0.5 / 255, 1e-4
CONCURRENT = 16
worst: dict[str, float] = {}  # what was compared -> the largest difference, for docs/parity.md


@dataclass(frozen=True)
class Expected:
    """A picture, and what the reference says of it."""

    url: str
    seen: Seen
    size: tuple[int, int]
    anomaly_map: np.ndarray  # calibrated
    regions: list[Region]

    @property
    def verdict(self) -> str:
        return "anomalous" if self.seen.score >= 0.5 else "normal"

    @property
    def facts(self) -> str:
        places = list(dict.fromkeys(region.position for region in self.regions))[:3]
        count = {0: "no regions", 1: "1 region: "}.get(
            len(self.regions), f"{len(self.regions)} regions: "
        )
        return f"Inspection: {self.verdict}, {count}{', '.join(places)}.\n"


def data_uri(picture: Image.Image) -> str:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def reference():
    # On a busy machine torch's threads wait for each other longer than one alone needs.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Reference.of_folder(NANO)
    torch.set_num_threads(threads)
    for what, difference in worst.items():
        print(f"served, {what}: largest difference {difference:.1e}")


@pytest.fixture(scope="module")
def expected(reference) -> list[Expected]:
    """Sixteen different pictures, of all grids of crops."""
    generator = np.random.default_rng(0)
    sizes = np.exp(generator.uniform(np.log(40), np.log(900), (CONCURRENT, 2))).astype(int).tolist()
    return [
        judge(reference, draw(width, height, seed)) for seed, (width, height) in enumerate(sizes)
    ]


def judge(reference: Reference, picture: Image.Image) -> Expected:
    """Calibrated map and regions of what the reference sees."""
    seen, calibration = reference.see(picture), reference.calibration
    side = reference.model.config.vision_config.image_size
    significance = stitch(seen.significance, seen.grid, picture.size, side).double()
    logit = torch.logit(significance, 1e-7)
    found = torch.sigmoid(calibration["map_scale"] * logit + calibration["map_bias"]).numpy()
    anomalous = seen.score >= 0.5
    regions = find_regions(found, picture.size, at_least_one=True) if anomalous else []
    return Expected(data_uri(picture), seen, picture.size, found, regions)


@dataclass(frozen=True)
class Answer:
    """What transformers generates from the reference's embeddings."""

    text: str
    log_probabilities: list[float]  # of each token of it


def answer_of(reference: Reference, pictures: list[Expected], *, grounding: bool) -> Answer:
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": QUESTION}]
    text = reference.processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    facts = [picture.facts if grounding else "" for picture in pictures]
    embeddings = [picture.seen.embeddings for picture in pictures]
    prompt = reference.prompt(text, embeddings, facts)
    ids = reference.answer(prompt, TOKENS)
    places = reference.logits(torch.cat((prompt, reference.embed(ids))))[len(prompt) - 1 : -1]
    chosen = places.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    text = reference.processor.tokenizer.decode(ids, skip_special_tokens=True)
    return Answer(text, chosen.tolist())


@pytest.fixture(scope="module")
def answers(reference, expected) -> list[Answer]:
    """The grounded answers about each picture alone."""
    return [answer_of(reference, [picture], grounding=True) for picture in expected]


def ask(client: OpenAI, pictures: list[Expected], *, stream: bool = False, **inspection: bool):
    """The question about some pictures, greedily."""
    images = [{"type": "image_url", "image_url": {"url": picture.url}} for picture in pictures]
    return client.chat.completions.create(
        model="looktwice-nano",
        messages=[{"role": "user", "content": [*images, {"type": "text", "text": QUESTION}]}],
        temperature=0,
        max_tokens=TOKENS,
        logprobs=True,
        stream=stream,
        extra_body={"inspection": inspection} if inspection else {},
    )


def close(what: str, ours, theirs, tolerance: float) -> None:
    """Numbers or arrays equal to a tolerance; the largest difference is remembered."""
    difference = float(np.abs(np.subtract(ours, theirs)).max())
    worst[what] = max(worst.get(what, 0.0), difference)
    assert difference <= tolerance, what


def check_inspection(found: dict, picture: Expected, image: int = 0) -> None:
    """An inspection as served against the reference."""
    close("score", found["score"], picture.seen.score, SCORE)
    assert found["verdict"] == picture.verdict
    assert found["severity"] == ("slightly", "moderately", "highly")[picture.seen.adverb]
    assert (found["width"], found["height"]) == picture.size
    assert found["image"] == image
    assert len(found["regions"]) == len(picture.regions)
    for ours, theirs in zip(found["regions"], picture.regions, strict=True):
        close("peaks of the map", ours["score"], theirs.score, MAP)
        assert ours["position"] == theirs.position
        assert ours["area"] == pytest.approx(theirs.area, abs=0.002)
        assert np.abs(np.subtract(ours["box"], theirs.box)).max() <= 2
    if found["map"] is not None:
        check_map(found["map"]["png"], picture)


def check_map(png: str, picture: Expected) -> None:
    grey = np.asarray(Image.open(BytesIO(base64.b64decode(png)))) / 255
    assert grey.shape == picture.anomaly_map.shape
    close("map as PNG (half a grey level is 2.0e-03)", grey, picture.anomaly_map, GREY + MAP)


def check_chat(completion, pictures: list[Expected], answer: Answer) -> None:
    assert completion.choices[0].message.content == answer.text
    tokens = [token.logprob for token in completion.choices[0].logprobs.content]
    likely = answer.log_probabilities[: len(tokens)]  # the end-of-text token may be left out
    assert tokens
    close("log probabilities of the answer", tokens, likely, LOG_PROBABILITY)
    inspections = completion.model_extra["inspections"]
    assert len(inspections) == len(pictures)
    for image, picture in enumerate(pictures):
        check_inspection(inspections[image], picture, image)


def test_one_picture_at_a_time_equals_the_reference(openai_client, expected, answers):
    for picture, answer in zip(expected[:4], answers[:4], strict=True):
        check_chat(ask(openai_client, [picture], map=True), [picture], answer)


def test_answer_without_grounding_equals_the_papers_prompt(openai_client, reference, expected):
    for picture in expected[4:7]:
        answer = answer_of(reference, [picture], grounding=False)
        check_chat(ask(openai_client, [picture], grounding=False), [picture], answer)


def test_sixteen_pictures_at_once_equal_the_reference(openai_client, expected, answers):
    with ThreadPoolExecutor(CONCURRENT) as pool:
        completions = pool.map(lambda picture: ask(openai_client, [picture], map=True), expected)
        for completion, picture, answer in zip(completions, expected, answers, strict=True):
            check_chat(completion, [picture], answer)


def test_same_picture_again_equals_the_first_time(openai_client, expected, answers):
    first, second = (ask(openai_client, expected[8:9], map=True) for _ in range(2))
    for completion in (first, second):
        check_chat(completion, expected[8:9], answers[8])
    one, other = (each.model_extra["inspections"][0] for each in (first, second))
    assert one["id"] != other["id"]
    own = {"id", "created"}
    assert {key: one[key] for key in one.keys() - own} == {
        key: other[key] for key in other.keys() - own
    }


@pytest.mark.parametrize("order", [(9, 10), (10, 9), (10, 10)], ids=["two", "swapped", "twice"])
def test_two_pictures_in_a_request_equal_the_reference(openai_client, reference, expected, order):
    pictures = [expected[i] for i in order]
    answer = answer_of(reference, pictures, grounding=True)
    check_chat(ask(openai_client, pictures, map=True), pictures, answer)


def test_pictures_of_unequal_grids_in_a_request_equal_the_reference(
    openai_client, reference, expected
):
    by_crops = sorted(expected, key=lambda picture: picture.seen.grid)
    pictures = [by_crops[-1], by_crops[0]]
    assert pictures[0].seen.grid == (2, 2)
    assert pictures[1].seen.grid == (1, 1)
    answer = answer_of(reference, pictures, grounding=True)
    check_chat(ask(openai_client, pictures), pictures, answer)


def test_streamed_answer_equals_the_reference(openai_client, expected, answers):
    chunks = list(ask(openai_client, expected[11:12], stream=True, map=True))
    with_choices = [chunk for chunk in chunks if chunk.choices]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in with_choices)
    assert text == answers[11].text
    carrying = [chunk for chunk in chunks if "inspections" in chunk.model_extra]
    assert carrying == with_choices[-1:]
    check_inspection(carrying[0].model_extra["inspections"][0], expected[11])


def inspect(url: str, pictures: list[Expected]) -> list[dict]:
    body = {"images": [picture.url for picture in pictures], "map": True}
    answer = httpx.post(f"{url}/inspections", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def test_inspections_without_the_language_model_equal_the_reference(server, expected):
    for image, found in enumerate(inspect(server.url, expected)):
        check_inspection(found, expected[image], image)


def test_two_api_processes_with_full_caches_equal_the_reference(two_processes, expected, answers):
    def serve(i: int):
        # A client of its own: a new connection, which either of the processes takes.
        with OpenAI(base_url=two_processes.url, api_key="none", max_retries=0) as client:
            return ask(client, [expected[i]], map=True)

    again = [*range(CONCURRENT), *range(0, CONCURRENT, 2)]
    with ThreadPoolExecutor(CONCURRENT) as pool:
        for i, completion in zip(again, pool.map(serve, again), strict=True):
            check_chat(completion, [expected[i]], answers[i])
    for image, found in enumerate(inspect(two_processes.url, expected)):
        check_inspection(found, expected[image], image)
