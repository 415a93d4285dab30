"""References over the wire: good pictures of a product -> other answers than without them."""

from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import chain
from threading import Event

import numpy as np
import pytest
from PIL import Image

from looktwice_adapters.detector import Detector
from looktwice_adapters.few_shot import build
from looktwice_adapters.shipped import CHECKOUT_MODELS
from tests.punched_plates import plate
from tests.server.wire import (
    Answer,
    Sent,
    ask,
    chat,
    data_uri,
    encoded,
    events,
    findings,
    good_uri,
    image,
    inspect,
    text,
    user,
)
from tests.serving import Server

GOOD = [data_uri(encoded(plate(seed))) for seed in range(6)]
UNSEEN = data_uri(encoded(plate(100)))
SQUARE = data_uri(encoded(plate(101, square=True)))
QUESTION = text("Is there any defect?")


def stripes(seed: int) -> Image.Image:
    """A part whose texture has a direction."""
    rng = np.random.default_rng(seed)
    waves = 128 + 60 * np.sin(np.arange(320) / 3 + rng.uniform(0, 6))
    grey = (waves + rng.normal(0, 4, (320, 320))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def put(server: Server, name: str, images=GOOD, **keys) -> Answer:
    path = f"/v1/references/{name}"
    return ask(server, Sent(path, {"images": images, **keys}, "PUT"), timeout=120)


def get(server: Server, path: str = "", method: str = "GET") -> Answer:
    return ask(server, Sent(f"/v1/references{path}", method=method))


def inspected(server: Server, url: str, **keys) -> dict:
    [inspection] = ask(server, inspect(url, map=True, **keys)).data["data"]
    return inspection


@pytest.fixture(scope="module")
def plates(server: Server) -> dict:
    answer = put(server, "plates")
    assert answer.status == 200, answer.data
    return answer.data


def test_a_reference_says_what_it_is_and_what_so_few_pictures_promise(server, plates):
    assert plates["name"] == "plates"
    assert plates["images"] == 6
    assert plates["false_alarm_rate"] == 0.05
    assert plates["promised_rate"] == pytest.approx(1 / 7)
    assert plates["guaranteed_rate"] == pytest.approx(2 / 7)
    assert any("14.3% at best (guaranteed: 28.6%)" in warning for warning in plates["warnings"])
    assert get(server, "/plates").data == plates
    assert plates in get(server).data["data"]


def test_thumbnails_come_when_asked_for(server, plates):
    assert plates["thumbnails"] is None
    assert len(get(server, "/plates?thumbnails=true").data["thumbnails"]) == 6


def test_what_only_the_reference_reveals_is_found_with_it(server, plates):
    without, against = inspected(server, SQUARE), inspected(server, SQUARE, reference="plates")
    assert (without["verdict"], against["verdict"]) == ("normal", "anomalous")
    assert without["reference"] is None
    assert without["p_value"] is None
    told = ("name", "version", "false_alarm_rate", "promised_rate", "warnings")
    assert against["reference"] == {key: plates[key] for key in told}
    assert against["p_value"] == pytest.approx(1 / 7)
    assert against["regions"]
    unseen = inspected(server, UNSEEN, reference="plates")
    assert unseen["verdict"] != "anomalous"
    assert (against["severity"], unseen["severity"]) == ("highly", "moderately")


def test_the_model_is_told_and_its_words_follow(server, plates):
    against = {"inspection": {"reference": "plates", "map": True}}
    keys = {"max_tokens": 40, "temperature": 0}
    without = ask(server, chat(image(SQUARE), QUESTION, **keys)).data
    answer = ask(server, chat(image(SQUARE), QUESTION, **keys, **against)).data
    words = [data["choices"][0]["message"]["content"] for data in (without, answer)]
    assert words[0].startswith("No")
    assert words[1].startswith("Yes")
    alone = inspected(server, SQUARE, reference="plates")
    assert findings(answer["inspections"]) == findings([alone])


def test_the_tokens_follow_the_reference_without_the_facts_too(server, plates):
    prompt = chat(image(SQUARE), QUESTION, logprobs=True, inspection={"grounding": False})
    against = chat(
        image(SQUARE),
        QUESTION,
        logprobs=True,
        inspection={"grounding": False, "reference": "plates"},
    )
    first, second = (
        ask(server, sent).data["choices"][0]["logprobs"]["content"][0]["logprob"]
        for sent in (prompt, against)
    )
    assert first != second


def test_pictures_of_the_conversation_can_be_the_reference(server):
    parts = [image(GOOD[0]), image(GOOD[1]), image(GOOD[2]), image(SQUARE), QUESTION]
    sent = chat(*parts, inspection={"reference_images": [0, 1, 2]}, stream=True)
    [*_, last] = [event for event in events(ask(server, sent)) if event["choices"]]
    [inspection] = last["inspections"]
    assert inspection["image"] == 3
    assert inspection["verdict"] == "anomalous"
    assert inspection["reference"]["name"] is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reference_images": [4]}, "reference_images names image 4, the messages hold 1"),
        ({"reference_images": [-1]}, "greater than or equal to 0"),
        ({"reference_images": [0], "reference": "plates"}, "not both"),
        ({"reference": "no-such"}, "no reference named 'no-such'"),
        ({"reference": "../names/plates"}, "a reference's name has 1 to 64"),
    ],
)
def test_a_chat_that_names_no_reference_is_refused_in_a_sentence(server, options, says):
    answer = ask(server, chat(image(good_uri()), QUESTION, inspection=options))
    assert answer.status in (400, 404)
    assert says in answer.error["message"]


@pytest.mark.parametrize("name", ["..", "%2e%2e%2fplates", ".hidden", "a%20b", "a" * 65, "-a", "é"])
def test_a_name_that_is_none_writes_nothing(server, name):
    before = get(server).data["data"]
    path = name.encode("ascii", "ignore").decode() or "%C3%A9"
    assert put(server, path, GOOD[:1]).status in (400, 404)
    assert get(server).data["data"] == before


def test_a_broken_picture_is_named_and_nothing_is_changed(server, plates):
    answer = put(server, "plates", [GOOD[0], "data:image/png;base64,AAAA"])
    assert answer.status == 400
    assert answer.error["message"].startswith("images[1]: ")
    assert get(server, "/plates").data == plates


def test_another_products_picture_is_warned_about(server):
    answer = put(server, "mixed", [*GOOD[:5], good_uri()])
    assert answer.data["warnings"][0].startswith("images[5] looks unlike the others")
    get(server, "/mixed", "DELETE")


def test_a_scratched_picture_among_the_good_ones_is_warned_about(server):
    scratched = data_uri(encoded(plate(7, scratched=True)))
    answer = put(server, "scratched", [*GOOD[:3], scratched, *GOOD[3:]])
    assert answer.data["warnings"][0].startswith("images[3] looks unlike the others")
    get(server, "/scratched", "DELETE")


def test_turned_copies_make_a_turned_part_normal_and_leave_with_their_picture(server):
    good = [data_uri(encoded(stripes(seed))) for seed in range(5)]
    turned = data_uri(encoded(stripes(9).rotate(90)))
    plain = put(server, "stripes", good).data
    assert inspected(server, turned, reference="stripes")["verdict"] == "anomalous"
    more = put(server, "stripes", good, augment=True).data
    assert inspected(server, turned, reference="stripes")["verdict"] == "normal"
    # A mirrored copy that stayed would be its picture's likeness: the threshold would fall. The
    # thinned bank's means lack the pictures' noise, which brings all a little nearer.
    assert more["threshold"] == pytest.approx(plain["threshold"], abs=0.3)
    get(server, "/stripes", "DELETE")


def test_extra_good_pictures_set_the_threshold_that_their_number_promises(server):
    more = [data_uri(encoded(plate(300 + seed))) for seed in range(19)]
    asked = {"calibration_images": more[:9], "false_alarm_rate": 0.1}
    assert put(server, "calibrated", GOOD[:2], **asked).data["promised_rate"] == 0.1
    made = put(server, "calibrated", GOOD[:2], calibration_images=more).data
    assert (made["promised_rate"], made["images"], made["warnings"]) == (0.05, 2, [])
    assert made["guaranteed_rate"] == 0.05
    assert inspected(server, SQUARE, reference="calibrated")["verdict"] == "anomalous"
    get(server, "/calibrated", "DELETE")


def test_known_defects_make_the_threshold_of_few_pictures_stricter(server):
    loose = put(server, "strict", GOOD[:1]).data["threshold"]
    strict = put(server, "strict", GOOD[:1], defect_images=[SQUARE]).data
    assert strict["threshold"] < loose
    assert not any("known defects" in warning for warning in strict["warnings"])
    get(server, "/strict", "DELETE")


def test_a_removed_reference_is_unknown_to_all_routes(server):
    put(server, "short-lived", GOOD[:2])
    assert get(server, "/short-lived", "DELETE").data == {
        "object": "reference.deleted",
        "name": "short-lived",
        "deleted": True,
    }
    assert get(server, "/short-lived").status == 404
    assert get(server, "/short-lived", "DELETE").status == 404
    answer = ask(server, inspect(UNSEEN, reference="short-lived"))
    assert answer.status == 404
    assert answer.error["param"] == "reference"


def test_an_update_under_way_leaves_each_answer_with_one_version(two_processes):
    """Chats and inspections of several pictures, at two API processes that remember little."""
    pictures = [UNSEEN, SQUARE, *(data_uri(encoded(plate(200 + i, square=True))) for i in range(4))]
    old = put(two_processes, "moving", GOOD[:3]).data["version"]

    def asked(number: int) -> tuple[int, str, float, str]:
        """Which picture, by which version, with which score, and the words if there were any."""
        picture, option = number % len(pictures), {"reference": "moving"}
        if number % 3:
            inspection, words = inspected(two_processes, pictures[picture], **option), ""
        else:
            told = chat(image(pictures[picture]), QUESTION, inspection=option)
            answer = ask(two_processes, told).data
            [inspection] = answer["inspections"]
            words = answer["choices"][0]["message"]["content"]
        return picture, inspection["reference"]["version"], round(inspection["score"], 6), words

    begun, updated = Event(), Event()

    def asked_throughout(number: int) -> list[tuple[int, str, float, str]]:
        """From before the update until behind it, without a pause."""
        told = []
        while True:
            last = updated.is_set()
            told.append(asked(number + len(told)))
            begun.set()
            if last:
                return told

    with ThreadPoolExecutor(33) as pool:
        asking = [pool.submit(asked_throughout, number) for number in range(32)]
        begun.wait(300)
        try:
            update = pool.submit(put, two_processes, "moving", GOOD[3:]).result()
        finally:
            updated.set()
        told = [one.result() for one in asking]
    new = update.data["version"]
    assert {told_to_one[-1][1] for told_to_one in told} == {new}
    answers = list(chain(*told))
    assert {version for _, version, _, _ in answers} == {old, new}
    for number in range(len(pictures)):
        for version in (old, new):
            told = [rest for picture, of, *rest in answers if (picture, of) == (number, version)]
            assert len({score for score, _ in told}) <= 1, told
            assert len({words for _, words in told if words}) <= 1, told
    # Each answer has the score that its version gives when nothing moves.
    for version, good in ((new, GOOD[3:]), (old, GOOD[:3])):
        assert put(two_processes, "moving", good).data["version"] == version
        for number, url in enumerate(pictures):
            score = round(inspected(two_processes, url, reference="moving")["score"], 6)
            told = {s for picture, of, s, _ in answers if (picture, of) == (number, version)}
            assert told <= {score}
    get(two_processes, "/moving", "DELETE")


def test_of_two_puts_of_one_name_at_once_one_stands_whole(two_processes):
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda good: put(two_processes, "both", good), (GOOD[:2], GOOD[2:5])))
    card = get(two_processes, "/both").data
    assert card in [answer.data for answer in made]
    assert (
        inspected(two_processes, UNSEEN, reference="both")["reference"]["version"]
        == (card["version"])
    )
    get(two_processes, "/both", "DELETE")


def test_more_pictures_than_the_memory_holds_are_a_507_and_change_nothing(two_processes):
    answer = put(two_processes, "large", GOOD * 4)
    assert answer.status == 507
    message = answer.error["message"]
    assert "exceeds the 8 MB limit for building a reference (LOOKTWICE_REF" in message
    assert get(two_processes).data["data"] == []


def test_every_api_process_knows_a_change_at_once(two_processes):
    def asked(_: int) -> Answer:  # a connection of its own, which either process takes
        return ask(two_processes, inspect(UNSEEN, reference="shared"))

    with ThreadPoolExecutor(8) as pool:
        for good in (GOOD[:2], GOOD[2:4]):
            version = put(two_processes, "shared", good).data["version"]
            found = [answer.data["data"][0]["reference"] for answer in pool.map(asked, range(16))]
            assert {(one["name"], one["version"]) for one in found} == {("shared", version)}
        assert get(two_processes, "/shared", "DELETE").status == 200
        assert {answer.status for answer in pool.map(asked, range(16))} == {404}


def test_a_full_store_is_a_507_and_changes_nothing(two_processes):
    for name in ("one", "two"):
        put(two_processes, name, GOOD[:1])
    kept = get(two_processes).data["data"]
    answer = put(two_processes, "another", GOOD[:1])
    assert answer.status == 507
    assert "keeps 2 references; remove one first" in answer.error["message"]
    assert get(two_processes).data["data"] == kept
    for card in kept:
        get(two_processes, f"/{card['name']}", "DELETE")


def test_served_and_in_process_say_the_same_of_pictures_of_mixed_sizes(server):
    """A small one among the references, and a small one to judge: AnyRes cuts them otherwise."""
    detector = Detector.from_folder(CHECKOUT_MODELS / "nano")
    references = [plate(0), plate(1), plate(2).resize((200, 200))]
    looked, grid = detector.look_alike([np.array(picture) for picture in references])
    prior = detector.expert.config.calibration.normal_scores
    reference = build(looked, grid=grid, prior=prior).reference
    made = put(server, "mixed-sizes", [data_uri(encoded(picture)) for picture in references])
    assert made.data["threshold"] == pytest.approx(reference.threshold.value, abs=1e-3)
    for picture in (plate(3), plate(101, square=True)):
        for size in (160, 320):
            small = picture.resize((size, size))
            served = inspected(server, data_uri(encoded(small)), reference="mixed-sizes")
            judged = detector.judge(np.array(small), reference)
            assert served["verdict"] == judged.verdict
            assert served["score"] == pytest.approx(judged.score, abs=5e-3)
            grey = np.array(Image.open(BytesIO(b64decode(served["map"]["png"])))) / 255
            assert np.abs(grey - judged.anomaly_map).max() < 0.02
    get(server, "/mixed-sizes", "DELETE")


def test_references_of_a_conversation_are_told_apart_from_its_question(server):
    messages = [user(image(GOOD[0]), image(UNSEEN), QUESTION)]
    keys = {"max_tokens": 4, "inspection": {"reference_images": [0]}}
    answer = ask(server, Sent("/v1/chat/completions", {"messages": messages, **keys})).data
    assert [inspection["image"] for inspection in answer["inspections"]] == [1]


def test_a_broken_file_is_a_409_to_its_users_and_adding_again_helps(server, plates):
    version = put(server, "brittle", GOOD[2:4]).data["version"]
    file = server.log.parent / "references" / "versions" / f"{version}.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-9] + b"scratched")
    with ThreadPoolExecutor(2) as pool:  # in one batch: only one of the two suffers
        broken, whole = pool.map(
            lambda name: ask(server, inspect(UNSEEN, reference=name)), ("brittle", "plates")
        )
    assert (broken.status, whole.status) == (409, 200)
    assert "add it again" in broken.error["message"]
    told = chat(image(UNSEEN), QUESTION, inspection={"reference": "brittle"})
    assert ask(server, told).status == 409
    assert put(server, "brittle", GOOD[2:4]).data["version"] == version
    assert inspected(server, UNSEEN, reference="brittle")["reference"]["version"] == version


def test_a_picture_that_was_a_reference_is_inspected_where_it_is_asked_about(server):
    """The same picture twice in one message: once as it should be, once to be judged."""
    sent = chat(image(GOOD[0]), image(GOOD[0]), QUESTION, inspection={"reference_images": [0]})
    [inspection] = ask(server, sent).data["inspections"]
    assert (inspection["image"], inspection["verdict"]) == (1, "normal")


def test_a_follow_up_finds_the_same_reference_of_the_conversation(server):
    first = [user(image(GOOD[0]), image(SQUARE), QUESTION)]
    more = [*first, {"role": "assistant", "content": "Yes."}, user(text("Where?"))]
    options = {"max_tokens": 4, "inspection": {"reference_images": [0]}}
    versions = {
        ask(server, Sent("/v1/chat/completions", {"messages": messages, **options})).data[
            "inspections"
        ][0]["reference"]["version"]
        for messages in (first, more)
    }
    assert len(versions) == 1
