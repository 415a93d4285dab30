"""`looktwice evaluate --url`: inspections, references, answers and benchmarks on the wire."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from looktwice_adapters.datasets import Sample
from looktwice_adapters.evaluate.reasoning import similarity
from looktwice_adapters.evaluate.server import ServerJudge
from looktwice_clients.cli import run
from tests.adapters.scripted_server import completion, pictures_in, question_in, scripted_server

SCRATCHED = Path(__file__).parents[2] / "examples" / "scratched.png"


def png(value, size=(40, 32)):
    out = io.BytesIO()
    Image.new("L", size, value).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def picture_of(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def sees_bright(uri):
    return int(picture_of(uri).max()) > 200


def looktwice(method, path, body):
    """Says that a bright picture is anomalous, in chat with one mistake: normal ones get a yes."""
    if path == "/v1/inspections":
        [uri] = body["images"]
        score, verdict = (0.9, "anomalous") if sees_bright(uri) else (0.2, "normal")
        inspection = {"score": score, "verdict": verdict, "map": {"png": png(int(255 * score))}}
        return 200, {"object": "list", "data": [inspection]}
    if path.startswith("/v1/references/"):
        return 200, {"object": "reference"}
    if path == "/v1/chat/completions":
        return 200, completion("Yes, there is a dent.")
    return 404, {"error": {"message": f"no route {path}"}}


def evaluate(capsys, *arguments):
    code = run(["evaluate", *map(str, arguments), "--json", "--draws", "0"])
    return code, capsys.readouterr()


def test_a_servers_inspections_are_measured(cups, capsys):
    with scripted_server(looktwice) as server:
        code, printed = evaluate(capsys, cups, "--url", server.url)
    assert code == 0, printed.err
    metrics = json.loads(printed.out)["mean"]
    assert metrics["image_auroc"] == metrics["verdict_accuracy"] == 1
    assert metrics["pixel_auroc"] > 0.5
    assert metrics["answer_accuracy"] is None
    assert all(body["map"] is True for body in server.bodies("/v1/inspections"))
    assert all("reference" not in body for body in server.bodies("/v1/inspections"))


def test_answers_are_asked_in_words_and_counted(cups, capsys):
    with scripted_server(looktwice) as server:
        code, printed = evaluate(capsys, cups, "--url", server.url, "--answers")
    assert code == 0, printed.err
    metrics = json.loads(printed.out)["mean"]
    assert metrics["answer_accuracy"] == 0.5
    assert metrics["answer_recall"] == 1
    assert metrics["answer_precision"] == 0.5
    asked = server.bodies("/v1/chat/completions")
    assert len(asked) == 10
    assert question_in(asked[0]) == "Is there a defect in this picture?"
    assert json.loads(printed.out)["settings"]["ask"] == question_in(asked[0])
    assert all(body["temperature"] == 0 and len(pictures_in(body)) == 1 for body in asked)
    assert all("inspection" not in body for body in asked)


def test_shots_are_put_on_the_server_used_and_taken_away_again(cups, capsys):
    with scripted_server(looktwice) as server:
        code, printed = evaluate(capsys, cups, "--url", server.url, "--shots", 2, "--seed", 1)
    assert code == 0, printed.err
    [(put, stored), (removed, path)] = [
        (method, path) for method, path, _ in server.requests if "references" in path
    ]
    assert (put, removed) == ("PUT", "DELETE")
    assert stored == path
    assert len(server.bodies(path)[0]["images"]) == 2
    name = path.removeprefix("/v1/references/")
    assert {b["reference"] for b in server.bodies("/v1/inspections")} == {name}


def test_two_evaluations_of_a_product_keep_out_of_each_others_way():
    with scripted_server(looktwice) as server:
        judges = [ServerJudge(server.url) for _ in range(2)]
        for judge in judges:
            judge.prepare("a set/" + "cup" * 40, [Sample(SCRATCHED, "cup", "train", "good")])
        names = {judge.reference for judge in judges}
        for judge in judges:
            judge.close()
            assert judge.client.is_closed()
    assert len(names) == 2
    assert all(re.fullmatch(r"evaluate-a-set-(cup)+c?u?-[0-9a-f]{8}", name) for name in names)
    assert {len(name) for name in names} == {64}


def test_with_shots_the_question_too_is_asked_against_the_reference(cups, capsys):
    with scripted_server(looktwice) as server:
        code, printed = evaluate(capsys, cups, "--url", server.url, "--shots", 2, "--answers")
    assert code == 0, printed.err
    asked = server.bodies("/v1/chat/completions")
    [name] = {body["inspection"]["reference"] for body in asked}
    assert len(asked) == 10
    assert name.startswith("evaluate-cup-")
    assert server.requests[-1][0] == "DELETE"  # after the last question


def test_references_are_taken_away_when_the_evaluation_fails(cups, capsys):
    def fails(method, path, body):
        if path == "/v1/inspections":
            return 400, {"error": {"message": "images[0]: too small"}}
        return looktwice(method, path, body)

    with scripted_server(fails) as server:
        code, printed = evaluate(capsys, cups, "--url", server.url, "--shots", 1)
    assert code == 1
    assert printed.err.strip().endswith("/v1/inspections answered 400: images[0]: too small")
    assert server.requests[-1][0] == "DELETE"


@pytest.mark.parametrize("alive", [15, 0])
def test_what_was_measured_before_a_failure_is_printed_and_written(cups, tmp_path, capsys, alive):
    """Of two products the first is done, or of none: pictures after the 15th are refused."""
    shutil.copytree(cups, tmp_path / "mug")
    out, left = tmp_path / "out", iter(range(alive))

    def dies(method, path, body):
        if path == "/v1/inspections" and next(left, None) is None:
            return 500, {"error": {"message": "out of memory"}}
        return looktwice(method, path, body)

    with scripted_server(dies) as server:
        code, printed = evaluate(capsys, cups, tmp_path / "mug", "--url", server.url, "--out", out)
    assert code == 1
    [line] = printed.err.strip().splitlines()
    assert "answered 500: out of memory" in line
    assert ("scripted ended early" if alive else "scripted was not run") in line
    found = json.loads(printed.out)
    assert json.loads((out / "metrics.json").read_text()) == found
    assert list(found.get("categories", ())) == (["cup"] if alive else [])
    assert ("ended_early" in found, "not_run" in found) == (alive > 0, alive == 0)
    assert ("ended early" in (out / "report.html").read_text()) is (alive > 0)


def test_a_failing_question_leaves_the_other_figures_and_its_answers(cups, mmad, tmp_path, capsys):
    left = iter(range(3))

    def dies(method, path, body):
        if path == "/v1/chat/completions" and next(left, None) is None:
            return 500, {"error": {"message": "out of memory"}}
        return looktwice(method, path, body)

    out = tmp_path / "out"
    with scripted_server(dies) as server:
        arguments = ("--url", server.url, "--questions", mmad, "--out", out)
        code, printed = evaluate(capsys, cups, *arguments)
    assert code == 1
    assert "mmad.json was not run to its end" in printed.err
    assert json.loads(printed.out)["mean"]["image_auroc"] == 1
    assert len(json.loads((out / "mmad_answers.json").read_text())) == 3
    assert "not run to its end" in (out / "report.html").read_text()


@pytest.mark.parametrize("page", ["<html>", {"data": []}, {"data": [{}]}, {}, []])
def test_an_address_that_is_no_openai_api_is_told_in_one_line(cups, capsys, page):
    with scripted_server(lambda *_: (200, page)) as server:
        root = server.url.removesuffix("/v1")
        code, printed = evaluate(capsys, cups, "--url", root)
        assert code == 1
        [line] = printed.err.strip().splitlines()
        assert ("lists no model" if page == {"data": []} else "is no OpenAI API") in line
        for named in ("", "#a-model"):
            code, printed = evaluate(capsys, cups, "--baseline", f"openai:{root}{named}")
            assert code == 1
            [line] = printed.err.strip().splitlines()
            assert root in line


def test_a_vision_model_is_a_baseline_scored_by_its_yes(cups, capsys):
    def model(method, path, body):
        bright = sees_bright(pictures_in(body)[0])
        top = [
            {"token": " Yes", "logprob": -0.1 if bright else -2.0, "bytes": None},
            {"token": "No", "logprob": -2.0 if bright else -0.1, "bytes": None},
        ]
        first = {"token": "No", "logprob": -0.1, "bytes": None, "top_logprobs": top}
        return 200, completion("Yes." if bright else "No.", logprobs={"content": [first]})

    with scripted_server(model) as server:
        code, printed = evaluate(capsys, cups, "--baseline", f"openai:{server.url}#big")
    assert code == 0, printed.err
    [(name, row)] = json.loads(printed.out)["baselines"].items()
    assert name == "big answers"
    assert row["mean"]["image_auroc"] == row["mean"]["verdict_accuracy"] == 1
    assert row["mean"]["pixel_auroc"] is None
    assert row["mean"]["ece"] == pytest.approx(1 - 1 / (1 + np.exp(-1.9)), abs=1e-6)
    assert {body["model"] for body in server.bodies("/v1/chat/completions")} == {"big"}


@pytest.mark.parametrize("refuses", [True, False])
def test_a_vision_model_without_log_probabilities_scores_yes_and_no(cups, capsys, refuses):
    def model(method, path, body):
        if refuses and "logprobs" in body:
            return 400, {"error": {"message": "logprobs is not supported"}}
        return 200, completion("I cannot tell.")

    with scripted_server(model) as server:
        code, printed = evaluate(capsys, cups, "--baseline", f"openai:{server.url}")
    assert code == 0, printed.err
    [row] = json.loads(printed.out)["baselines"].values()
    assert row["mean"]["image_auroc"] == 0.5
    assert row["mean"]["verdict_accuracy"] == 0


def test_a_baseline_that_is_not_there_is_a_row_that_was_not_run(cups, capsys):
    address = "http://127.0.0.1:9/v1"
    code, printed = evaluate(capsys, cups, "--baseline", f"openai:{address}")
    assert code == 1
    row = json.loads(printed.out)["baselines"][f"openai:{address}"]
    assert row["not_run"].startswith(f"no answer from {address}")
    assert "was not run" in printed.err


MMAD = {
    "cup/test/good/0.png": [("Anomaly Detection", "Any defect?", {"A": "Yes.", "B": "No."}, "B")],
    "cup/test/hole/0.png": [
        ("Anomaly Detection", "Any defect?", {"A": "Yes.", "B": "No."}, "A"),
        ("Defect Localization", "Where?", {"A": "Top.", "B": "Left.", "C": "Top left."}, "C"),
        ("Object Details", "What colour?", {"A": "Red.", "B": "Grey."}, "B"),
    ],
    "cup/test/hole/1.png": [("Anomaly Detection", "Any defect?", {"A": "Yes.", "B": "No."}, "A")],
}


@pytest.fixture
def mmad(cups):
    path = cups.parent / "mmad.json"
    keys = ("type", "Question", "Options", "Answer")
    path.write_text(
        json.dumps(
            {
                image: {"conversation": [dict(zip(keys, turn, strict=True)) for turn in turns]}
                for image, turns in MMAD.items()
            }
        )
    )
    return path


def test_multiple_choice_is_counted_as_mmad_does(mmad, tmp_path, capsys):
    def model(method, path, body):
        question = question_in(body)
        if "Any defect?" in question:
            return 200, completion("A. Yes.")
        return 200, completion("It is at the top left." if "Where?" in question else "no idea")

    with scripted_server(model) as server:
        code, printed = evaluate(
            capsys, "--url", server.url, "--questions", mmad, "--out", tmp_path / "out"
        )
    assert code == 0, printed.err
    figures = json.loads(printed.out)["reasoning"]["mmad.json"]
    detection = figures["subtasks"]["Anomaly Detection"]
    assert detection == {"accuracy": 0.5, "chance": 0.5, "questions": 3}  # normal 0, anomalous 1
    assert figures["subtasks"]["Defect Localization"]["accuracy"] == 1
    assert figures["subtasks"]["Object Analysis"]["accuracy"] == 0
    assert figures["average"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert figures["unreadable"] == 1
    answers = json.loads((tmp_path / "out" / "mmad_answers.json").read_text())
    assert [answer["letter"] for answer in answers] == ["A", "A", "C", None, "A"]
    assert "average of the subtasks" in (tmp_path / "out" / "report.html").read_text()


def asked_with(server):
    """Question -> the pictures that it was inspected against."""
    stored, against = {}, {}
    for method, path, body in server.requests:
        if method == "PUT":
            stored[path.rpartition("/")[2]] = [picture_of(uri) for uri in body["images"]]
        if path == "/v1/chat/completions":
            name = body.get("inspection", {}).get("reference")
            against[question_in(body)] = stored.get(name, [])
    return against


def test_choices_are_asked_against_the_pictures_that_mmads_file_names(mmad, cups, capsys):
    content = json.loads(mmad.read_text())
    for index, entry in enumerate(content.values()):
        named = [f"cup/train/good/{(index + shot) % 3}.png" for shot in range(2)]
        entry["random_templates"] = named
        entry["conversation"][0]["Question"] += f" {index}"
    mmad.write_text(json.dumps(content))
    with scripted_server(looktwice) as server:
        code, printed = evaluate(capsys, "--url", server.url, "--questions", mmad, "--shots", 1)
    assert code == 0, printed.err
    against = {q: shown for q, shown in asked_with(server).items() if "Any defect?" in q}
    assert len(against) == 3
    for index, shown in enumerate(against.values()):
        [picture] = shown
        good = np.asarray(Image.open(cups / "train" / "good" / f"{index}.png"))
        assert np.array_equal(picture, good)
    calls = [method for method, path, _ in server.requests if "references" in path]
    assert calls == ["PUT", "DELETE"] * 3  # one for each picture, not for each question
    assert json.loads(printed.out)["reasoning"]["mmad.json"]["with_references"] == 5


@pytest.mark.parametrize(("train", "shots", "found"), [(True, 2, 2), (False, 9, 4)])
def test_choices_whose_file_names_none_are_asked_against_good_ones(
    mmad, cups, capsys, train, shots, found
):
    """Those of the product's train/good, or those of test/good that nothing is asked about."""
    if not train:
        shutil.rmtree(cups / "train")
    pool = [
        path
        for path in sorted((cups / ("train" if train else "test") / "good").iterdir())
        if train or path.name != "0.png"
    ]
    with scripted_server(looktwice) as server:
        code, printed = evaluate(capsys, "--url", server.url, "--questions", mmad, "--shots", shots)
    assert code == 0, printed.err
    [path] = {path for method, path, _ in server.requests if method == "PUT"}
    used = [picture_of(uri).tobytes() for uri in server.bodies(path)[0]["images"]]
    assert len(used) == found
    assert set(used) <= {np.asarray(Image.open(one)).tobytes() for one in pool}
    assert all("inspection" in body for body in server.bodies("/v1/chat/completions"))
    assert server.requests[-1][0] == "DELETE"


def test_a_server_that_keeps_no_references_leaves_the_other_figures(cups, mmad, capsys):
    def no_store(method, path, body):
        refused = path.startswith("/v1/references/evaluate-questions")
        return (404, {"error": {"message": "no"}}) if refused else looktwice(method, path, body)

    with scripted_server(no_store) as server:
        code, printed = evaluate(
            capsys, cups, "--url", server.url, "--questions", mmad, "--shots", 1
        )
    assert code == 1
    shown = json.loads(printed.out)
    assert shown["mean"]["image_auroc"] == 1
    assert "answered 404: no" in shown["reasoning"]["mmad.json"]["not_run"]


def test_choices_about_pictures_without_good_ones_are_asked_alone(mmad, cups, capsys):
    shutil.rmtree(cups / "train")
    for path in (cups / "test" / "good").iterdir():
        if path.name != "0.png":
            path.unlink()
    with scripted_server(looktwice) as server:
        code, printed = evaluate(capsys, "--url", server.url, "--questions", mmad, "--shots", 1)
    assert code == 0, printed.err
    assert all("inspection" not in body for body in server.bodies("/v1/chat/completions"))
    assert json.loads(printed.out)["reasoning"]["mmad.json"]["with_references"] == 0


def test_a_missing_normal_picture_is_told_before_anything_is_asked(mmad, capsys):
    content = json.loads(mmad.read_text())
    content["cup/test/good/0.png"]["random_templates"] = ["cup/train/good/99.png"]
    mmad.write_text(json.dumps(content))
    with scripted_server(looktwice) as server:
        code, printed = evaluate(capsys, "--url", server.url, "--questions", mmad, "--shots", 1)
    assert code == 1
    [line] = printed.err.strip().splitlines()
    assert "there is no picture" in line
    assert line.endswith("99.png")
    assert not server.bodies("/v1/chat/completions")


@pytest.fixture
def dialogues(cups):
    path = cups.parent / "visa_dr.json"
    entry = {
        "image": "cup/test/hole/0.png",
        "questions": ["Is there a defect?", "What should be done?"],
        "answers": ["Yes, there is a hole in the middle.", "Take the cup out of the line."],
    }
    path.write_text(json.dumps([entry]))
    return path


def test_dialogues_are_held_with_the_models_own_answers_and_marked(dialogues, capsys):
    def model(method, path, body):
        first = len(body["messages"]) == 1
        return 200, completion("Yes, there is a hole in the middle." if first else "Sing a song.")

    def marker(method, path, body):
        assert pictures_in(body) == []
        return 200, completion("2" if "Sing a song." in question_in(body) else "10 of 10")

    with scripted_server(model) as server, scripted_server(marker) as judge:
        arguments = ("--url", server.url, "--questions", dialogues, "--judge", f"{judge.url}#m")
        code, printed = evaluate(capsys, *arguments)
    assert code == 0, printed.err
    figures = json.loads(printed.out)["reasoning"]["visa_dr.json"]
    first, second = figures["turns"]
    assert (first["rouge_l"], first["mark"]) == (1, 1)
    assert first["similarity"] == pytest.approx(1, abs=1e-5)
    assert second["rouge_l"] < 0.3
    assert second["similarity"] < 0.5
    assert second["mark"] == 0.2
    assert figures["mark"] == 0.6
    asked = server.bodies("/v1/chat/completions")
    assert [len(body["messages"]) for body in asked] == [1, 3]
    assert asked[1]["messages"][1]["content"] == "Yes, there is a hole in the middle."
    assert len(pictures_in(asked[1])) == 1


def test_llavas_conversations_are_asked_as_dialogues(dialogues, capsys):
    said = [("system", "Be brief."), ("human", "<image>\nA defect?"), ("gpt", "Yes.")]
    entry = {
        "image": ["cup/test/hole/0.png"],
        "conversations": [{"from": who, "value": text} for who, text in said],
    }
    dialogues.write_text(json.dumps([entry]))
    with scripted_server(lambda *_: (200, completion("Yes."))) as server:
        code, printed = evaluate(capsys, "--url", server.url, "--questions", dialogues)
    assert code == 0, printed.err
    [turn] = json.loads(printed.out)["reasoning"]["visa_dr.json"]["turns"]
    assert turn["rouge_l"] == 1
    [body] = server.bodies("/v1/chat/completions")
    assert question_in(body) == "A defect?"


def test_without_a_judge_there_is_no_mark(dialogues, capsys):
    with scripted_server(lambda *_: (200, completion("Yes."))) as server:
        code, printed = evaluate(capsys, "--url", server.url, "--questions", dialogues)
    assert code == 0, printed.err
    assert json.loads(printed.out)["reasoning"]["visa_dr.json"]["mark"] is None


def test_paraphrases_are_alike_where_rouge_sees_nothing():
    told = "The part has a scratch."
    assert similarity(told, "A scrape is visible on the component.") > 0.4
    assert similarity(told, "It is raining in Lisbon.") < 0.2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ('{"a.png": {"conversation": [{"Question": "?"}]}}', "a question without Options"),
        ('{"a.png": 3}', "neither MMAD's nor VisA-D&R's"),
        ('[{"image": "a.png", "questions": ["?"], "answers": []}]', "1 questions and 0 answers"),
        ('[{"questions": ["?"]}]', "entry 0 names no image"),
        ('[{"image": "a.png", "questions": ["?"], "answers": ["!"]}]', "there is no picture"),
        ("[]", "holds no question"),
        ('[{"image": 3, "questions": ["?"], "answers": ["!"]}]', "neither MMAD's nor VisA-D&R's"),
    ],
)
def test_a_file_of_another_shape_is_refused_in_one_line_before_anything_is_measured(
    cups, tmp_path, capsys, content, says
):
    (tmp_path / "questions.json").write_text(content)
    with scripted_server(looktwice) as server:
        code, printed = evaluate(
            capsys, cups, "--url", server.url, "--questions", tmp_path / "questions.json"
        )
    assert code == 1
    assert server.requests == []
    [line] = printed.err.strip().splitlines()
    assert says in line


@pytest.mark.parametrize(
    ("reply", "mark"),
    [
        ("8", 0.8),
        ("**8**", 0.8),
        ("10", 1),
        ("10 of 10", 1),
        ("0", 0),
        ("0/10", 0),
        ("8.5 / 10", 0.85),
        ("Of the 2 defects one is named: 6/10", 0.6),
        ("On a scale of 1 to 10: 8", 0.8),
        ("From 1 (wrong) to 10 (as good as the reference): 7.", 0.7),
        ("1-10", None),
        ("100", None),
        ("none", None),
    ],
)
def test_a_mark_is_read_from_a_reply(reply, mark):
    from looktwice_adapters.evaluate.reasoning import read_mark

    assert read_mark(reply) == mark


LETTERS = {"A": "Broken piece.", "B": "Water stain.", "C": "Top left.", "D": "Top."}


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. Water stain.", "B"),
        ("Answer: B.", "B"),
        ("The correct answer is b.", "B"),
        ("**B**", "B"),
        ("[B]", "B"),
        ("`B`", "B"),
        ("'B'", "B"),
        ("**Answer:** B", "B"),
        ("The correct answer is **B**", "B"),
        ("B is correct", "B"),
        ("B\n\nThe top left is fine.", "B"),
        ("A **water stain** is visible.", "B"),
        ("A water stain is visible.", "B"),
        ("The defect is top left.", "C"),
        ("At the top of it.", "D"),
        ("Brokn piece", "A"),
        ("There is one on the left.", "C"),
        ("A broken water pipe.", None),
        ("E. Something else.", None),
        ("I do not know that.", None),
        ("", None),
    ],
)
def test_an_answer_names_an_option_by_letter_or_words(said, letter):
    from looktwice_adapters.evaluate.multiple_choice import chosen_letter

    assert chosen_letter(said, LETTERS) == letter


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("An anomaly? Yes, and no doubt.", "A"),
        ("A is wrong, no.", "B"),
        ("I cannot see it: yes or no", "A"),
        ("Oh no", "B"),
    ],
)
def test_options_are_found_as_words_and_not_inside_others(said, letter):
    from looktwice_adapters.evaluate.multiple_choice import chosen_letter

    assert chosen_letter(said, {"A": "Yes.", "B": "No."}) == letter
