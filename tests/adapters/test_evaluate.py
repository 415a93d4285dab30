"""`looktwice evaluate`, in process: what known detectors get, and what is printed and written."""

import csv
import html.parser
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from looktwice_adapters.datasets import Sample, read_mask, read_sample
from looktwice_adapters.detector import Judgement
from looktwice_adapters.evaluate.baselines import BaselineError
from looktwice_adapters.evaluate.judge import ReferencesError
from looktwice_adapters.evaluate.product import Case, measure
from looktwice_adapters.evaluate.report import write_html
from looktwice_adapters.evaluate.results import Report, Row, table, write_csv
from looktwice_adapters.evaluate.run import baseline_row, judge_row, read_products
from looktwice_adapters.metrics import Metrics
from looktwice_clients.cli import run

NANO = Path(__file__).parents[2] / "models" / "nano"
EXPERT = str(NANO / "expert.safetensors")
DOCUMENTED = """image_auroc image_ap image_f1max pixel_auroc pixel_ap aupro verdict_accuracy
verdict_precision verdict_recall verdict_f1 answer_accuracy ece shortcut_auroc n_normal
n_anomalous""".split()


class Known:
    """A judge that does what it is told to."""

    name = "known"

    def __init__(self, judge):
        self.judge = judge
        self.prepared = []
        self.closed = False

    def prepare(self, product, references):
        self.prepared.append((product, [sample.path.name for sample in references]))

    def close(self):
        self.closed = True


def perfect(sample):
    mask = read_mask(sample, (64, 80)).astype(np.float32)
    return Judgement(*((0.9, "anomalous") if sample.anomalous else (0.1, "normal")), mask)


def constant(_):
    return Judgement(0.5, "anomalous", np.full((4, 5), 0.5, np.float32))


def figures(judge, root, draws=50):
    row = judge_row(Known(judge), read_products([root]), draws)
    return row.products["cup"].metrics


@pytest.fixture
def many_cups(cups):
    """More pictures, so that chance can be told from skill."""
    for kind in ("good", "hole"):
        for index in range(5, 60):
            (cups / "test" / kind / f"{index}.png").symlink_to(f"{index % 5}.png")
            if kind == "hole":
                mask = cups / "ground_truth" / "hole" / f"{index}_mask.png"
                mask.symlink_to(f"{index % 5}_mask.png")
    return cups


def test_a_perfect_detector_gets_100(cups):
    metrics = figures(perfect, cups)
    for name in DOCUMENTED[:10]:
        assert getattr(metrics, name) == pytest.approx(1), name
    assert metrics.intervals["image_auroc"] == (1, 1)
    assert (metrics.n_normal, metrics.n_anomalous) == (5, 5)
    assert metrics.ece == pytest.approx(0.1, abs=1e-6)


def test_a_constant_detector_gets_50(cups):
    metrics = figures(constant, cups)
    assert metrics.image_auroc == metrics.pixel_auroc == metrics.verdict_accuracy == 0.5
    assert metrics.aupro == pytest.approx(0.15)  # the diagonal's
    assert metrics.intervals["image_auroc"] == (0.5, 0.5)


def test_products_are_drawn_independently_and_judges_alike():
    def cases(product):
        return [
            Case(Sample(Path(f"{kind}{score}.png"), product, "test", kind), score, None, None, None)
            for kind, scores in (
                ("good", np.linspace(0, 0.7, 20)),
                ("dent", np.linspace(0.3, 1, 20)),
            )
            for score in scores
        ]

    left, again, right = (_figures_drawn(cases(name)) for name in ("left", "left", "right"))
    assert np.array_equal(left, again)
    assert abs(np.corrcoef(left, right)[0, 1]) < 0.3
    assert np.std((left + right) / 2) < 0.85 * np.std(left)


def _figures_drawn(cases):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "looktwice_adapters.evaluate.product.trivial_statistics", lambda _: {"x": 0.0}
        )
        return measure(cases, 200).draws["image_auroc"]


def test_a_random_detector_gets_about_50_and_its_interval_says_so(many_cups):
    rng = np.random.default_rng(0)

    def random(_):
        score = float(rng.random())
        verdict = "anomalous" if score >= 0.5 else "normal"
        return Judgement(score, verdict, rng.random((64, 80), np.float32))

    metrics = figures(random, many_cups, draws=200)
    assert metrics.image_auroc == pytest.approx(0.5, abs=0.12)
    assert metrics.pixel_auroc == pytest.approx(0.5, abs=0.02)
    assert metrics.verdict_accuracy == pytest.approx(0.5, abs=0.12)
    low, high = metrics.intervals["image_auroc"]
    assert low < 0.5 < high
    assert 0.05 < high - low < 0.3


def test_an_undecided_verdict_is_neither_right_nor_a_find(cups):
    metrics = figures(lambda sample: Judgement(perfect(sample).score, "undecided"), cups)
    assert metrics.verdict_accuracy == metrics.verdict_recall == 0
    assert metrics.image_auroc == 1


def test_a_detector_without_threshold_and_map_has_image_figures_only(cups):
    metrics = figures(lambda sample: Judgement(100.0 * sample.anomalous), cups)
    assert metrics.image_auroc == 1
    for name in ("verdict_accuracy", "ece", "pixel_auroc", "aupro", "answer_accuracy"):
        assert getattr(metrics, name) is None


def test_the_trivial_statistic_that_gives_the_class_away_is_named(cups):
    metrics = figures(constant, cups)
    assert metrics.shortcut_auroc == 1
    assert metrics.shortcut_name in ("mean brightness", "contrast", "gradient energy")


def test_shots_are_drawn_from_train_by_seed(cups):
    judge = Known(constant)
    row = judge_row(judge, read_products([cups], shots=3, seed=1), 0)
    [(product, names)] = judge.prepared
    assert product == "cup"
    assert len(set(names)) == 3
    assert row.mean().n_normal == 5
    assert judge.closed
    [(again, _)] = read_products([cups], shots=3, seed=1)["cup"].values()
    assert [sample.path.name for sample in again] == names
    drawn = {
        tuple(s.path.name for s in read_products([cups], 3, seed=s)["cup"]["cup"][0])
        for s in range(9)
    }
    assert len(drawn) > 1


def test_without_train_the_shots_leave_the_test(cups):
    for path in (cups / "train" / "good").iterdir():
        path.unlink()
    [(references, test)] = read_products([cups], shots=2)["cup"].values()
    assert len(references) == 2
    assert len(test) == 8
    assert not {sample.path for sample in references} & {sample.path for sample in test}


def test_more_shots_than_normal_pictures_are_refused(cups):
    with pytest.raises(ValueError, match=r"cup has 6 pictures in train/good, --shots 7"):
        read_products([cups], shots=7)


def test_a_product_without_test_pictures_and_two_sets_of_one_name_are_refused(cups, tmp_path):
    with pytest.raises(ValueError, match="there are two data sets called cup"):
        read_products([cups, cups])
    (tmp_path / "empty" / "test" / "good").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty has no test pictures"):
        read_products([tmp_path / "empty"])


def test_json_has_every_documented_key_as_a_number_or_null(cups):
    found = Report(judge_row(Known(perfect), read_products([cups]), 20)).as_json()
    assert set(DOCUMENTED) <= {field.name for field in fields(Metrics)}
    for metrics in (found["categories"]["cup"], found["mean"]):
        for name in DOCUMENTED:
            value = metrics[name]
            assert value is None or isinstance(value, int | float), name
            assert value is None or name.startswith("n_") or 0 <= value <= 1
    json.dumps(found)


def test_the_mean_is_macro_and_sets_have_their_own(cups, tmp_path):
    other = tmp_path / "plates"
    (other / "one").mkdir(parents=True)
    (other / "two").mkdir()
    for name in ("one", "two"):
        (other / name / "test").symlink_to(cups / "test")
    products = read_products([cups, other])
    row = judge_row(
        Known(lambda s: perfect(s) if s.product == "cup" else constant(s)), products, 10
    )
    found = row.as_json()
    assert list(found["categories"]) == ["cup", "plates/one", "plates/two"]
    assert found["mean"]["image_auroc"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert found["sets"]["plates"]["image_auroc"] == 0.5
    assert found["mean"]["n_normal"] == 15


def test_the_csv_files_hold_what_the_json_holds(cups, tmp_path):
    report = Report(judge_row(Known(perfect), read_products([cups]), 20))
    write_csv(report, tmp_path)
    with (tmp_path / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["category"] for row in rows] == ["cup", "mean"]
    assert float(rows[0]["image_auroc"]) == 1
    assert float(rows[0]["image_auroc_low"]) == 1
    with (tmp_path / "images.csv").open() as lines:
        images = list(csv.DictReader(lines))
    assert len(images) == 10
    assert {(i["anomalous"], i["verdict"]) for i in images} == {("0", "normal"), ("1", "anomalous")}


class Page(html.parser.HTMLParser):
    """Collects addresses and checks that tags close."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "link", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_needs_nothing_beside_it_and_shows_good_and_wrong_cases(cups, tmp_path):
    def wrong_about_one(sample):
        if sample.anomalous and sample.path.name == "2.png":
            return Judgement(0.2, "normal", np.zeros((64, 80), np.float32))
        return perfect(sample)

    products = read_products([cups])
    ours = judge_row(Known(wrong_about_one), products, 20)
    other = Row("clip:<none>", problem="no weights & no network")
    write_html(Report(ours, (other,)), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert "(wrong)" in text
    assert "not run: no weights &amp; no network" in text
    assert "<none>" not in text
    assert len(text) < 2_000_000


def test_only_telling_cases_keep_their_maps(many_cups):
    row = judge_row(Known(perfect), read_products([many_cups]), 0)
    kept = [case for case in row.products["cup"].cases if case.anomaly_map is not None]
    assert len(kept) == 8
    assert all(case.mask is not None for case in kept)


def test_a_report_of_large_pictures_stays_small(cups, tmp_path):
    rng = np.random.default_rng(0)
    for path in (cups / "test" / "good").iterdir():
        Image.fromarray(rng.integers(0, 255, (900, 1200, 3), np.uint8)).save(path)
    ours = judge_row(Known(constant), read_products([cups]), 0)
    write_html(Report(ours), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


def test_the_overlay_leaves_normal_parts_alone_and_outlines_the_mask(cups):
    from looktwice_adapters.evaluate.gallery import MASK_COLOUR, draw_overlay

    [(_, test)] = read_products([cups])["cup"].values()
    sample = next(sample for sample in test if sample.anomalous)
    picture, mask = read_sample(sample), read_mask(sample, (64, 80))
    drawn = draw_overlay(picture, mask.astype(np.float32), mask)
    away = ~cv2.dilate(mask.astype(np.uint8), np.ones((9, 9))).astype(bool)
    assert (drawn[away] == picture[away]).all()
    assert (drawn[mask] != picture[mask]).any()
    assert (drawn == MASK_COLOUR).all(-1).sum() > 20


def test_a_baseline_that_cannot_run_is_a_row_that_says_so(cups, monkeypatch):
    def impossible(argument, seed):
        raise BaselineError(f"no weights {argument!r}")

    def needs_shots(argument, seed):
        judge = Known(constant)

        def prepare(product, references):
            raise ReferencesError("needs --shots 1 or more")

        judge.prepare = prepare
        return judge

    from looktwice_adapters.evaluate import baselines

    monkeypatch.setitem(baselines.BASELINES, "clip", impossible)
    monkeypatch.setitem(baselines.BASELINES, "padim", needs_shots)
    products = read_products([cups])
    rows = tuple(baseline_row(spec, 0, products, 0) for spec in ("clip:X", "padim"))
    report = Report(judge_row(Known(perfect), products, 0), rows)
    assert report.as_json()["baselines"] == {
        "clip:X": {"not_run": "no weights 'X'"},
        "known": {"not_run": "needs --shots 1 or more"},
    }
    assert "clip:X: not run" in table(report)


def test_an_unexpected_error_ends_its_row_and_not_the_run(cups, tmp_path, monkeypatch, capsys):
    def breaks(argument, seed):
        raise KeyError(argument)

    class Forgetful(Known):
        def close(self):
            raise RuntimeError("no file to close")

    from looktwice_adapters.evaluate import baselines

    monkeypatch.setitem(baselines.BASELINES, "clip", breaks)
    monkeypatch.setitem(baselines.BASELINES, "padim", lambda *_: Forgetful(lambda _: [][1]))
    monkeypatch.setitem(baselines.BASELINES, "memory", lambda *_: Forgetful(perfect))
    named = [word for spec in ("clip:x", "padim", "memory") for word in ("--baseline", spec)]
    assert run(["evaluate", str(cups), *named, "--draws", "0", "--out", str(tmp_path / "out")]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "clip:x was not run: KeyError: 'x'; " in line
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["mean"]["image_auroc"] is not None
    assert found["baselines"]["known (padim)"]["not_run"] == "IndexError: list index out of range"
    assert found["baselines"]["known (memory)"]["ended_early"] == "RuntimeError: no file to close"
    assert (tmp_path / "out" / "report.html").exists()


def test_a_missing_extra_is_named_in_the_baselines_row(monkeypatch):
    def missing(argument, seed):
        raise ModuleNotFoundError("No module named 'anomalib'", name="anomalib")

    from looktwice_adapters.evaluate import baselines

    monkeypatch.setitem(baselines.BASELINES, "clip", missing)
    row = baseline_row("clip", 0, {}, 0)
    assert row.problem == "it needs anomalib: pip install 'looktwice[evaluate]'"


def test_references_that_leave_no_test_picture_are_refused(cups):
    shutil.rmtree(cups / "train")
    shutil.rmtree(cups / "test" / "hole")
    with pytest.raises(ValueError, match="cup has no test pictures left after --shots 5"):
        read_products([cups], shots=5)


def test_a_mean_has_the_interval_of_the_products_that_have_the_figure(cups, tmp_path):
    """Of one product's two masks one is empty: some draws have no defective pixel."""
    shutil.copytree(cups, tmp_path / "mug")
    for index in range(2, 5):
        (tmp_path / "mug" / "test" / "hole" / f"{index}.png").unlink()
    Image.new("L", (80, 64)).save(tmp_path / "mug" / "ground_truth" / "hole" / "1_mask.png")
    shutil.copytree(cups / "test" / "good", tmp_path / "plain" / "test" / "good")
    products = read_products([cups, tmp_path / "mug", tmp_path / "plain"])
    row = judge_row(Known(perfect), products, 40)
    assert row.products["mug"].metrics.pixel_auroc is not None
    assert "pixel_auroc" not in row.products["mug"].metrics.intervals
    mean = row.mean()
    assert "pixel_auroc" not in mean.intervals  # which is the mug's too
    assert mean.intervals["image_auroc"] == (1, 1)  # the plain one has none


def test_names_that_are_not_utf8_are_printed_and_written(cups, tmp_path, capsys):
    product = os.fsencode(tmp_path) + b"/set/c\xffp"
    shutil.copytree(os.fsencode(cups), product)
    os.rename(product + b"/test/good/0.png", product + b"/test/good/\xff.png")
    out = tmp_path / "out"
    arguments = ("--draws", "2", "--out", str(out))
    assert run(["evaluate", str(tmp_path / "set"), *arguments]) == 0
    assert "set/c\\udcffp" in capsys.readouterr().out
    assert "\\udcff.png" in (out / "images.csv").read_text()
    assert "set/c\\udcffp" in (out / "metrics.csv").read_text()
    assert "\\udcff.png" in (out / "report.html").read_text()


def test_the_table_is_printed_before_the_files_are_written(cups, tmp_path, monkeypatch, capsys):
    def disk_full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("looktwice_adapters.evaluate.results.write_csv", disk_full)
    assert run(["evaluate", str(cups), "--draws", "0", "--out", str(tmp_path / "out")]) == 1
    assert "cup " in capsys.readouterr().out


def test_a_decoders_row_and_settings_say_so(cups, monkeypatch, capsys, tmp_path):
    from looktwice_adapters.detector import Detector
    from looktwice_adapters.evaluate.report import write_html as written

    load, pages = Detector.from_folder, []
    monkeypatch.setattr(Detector, "from_folder", lambda folder, _: load(folder))
    monkeypatch.setattr(
        "looktwice_adapters.evaluate.report.write_html",
        lambda report, path: pages.append(report) or written(report, path),
    )
    flags = ("--decoder", EXPERT, "--draws", "0", "--limit", "2", "--json")
    assert run(["evaluate", str(cups), *flags, "--out", str(tmp_path / "out")]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["decoder"] == EXPERT
    assert settings["ask"] is None
    assert pages[0].ours.name == "nano with expert.safetensors"


def test_nano_is_measured_and_everything_is_written(cups, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["evaluate", str(cups), "--draws", "20", "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["categories"]["cup"]["n_anomalous"] == 5
    assert printed["categories"]["cup"]["pixel_auroc"] > 0.5
    assert json.loads((out / "metrics.json").read_text()) == printed
    assert {path.name for path in out.iterdir()} == {
        *("metrics.json", "metrics.csv", "images.csv", "report.html")
    }


def test_references_and_the_memory_bank_are_measured_in_process(cups, capsys):
    arguments = ("--shots", "4", "--baseline", "memory", "--draws", "0", "--json")
    assert run(["evaluate", str(cups), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    [memory] = found["baselines"].values()
    for metrics in (found["mean"], memory["mean"]):
        assert metrics["image_auroc"] == 1
        assert metrics["pixel_auroc"] > 0.95
    assert found["mean"]["verdict_recall"] == 1
    assert memory["mean"]["verdict_accuracy"] is None


def test_baselines_of_one_name_are_told_apart(cups, capsys):
    specs = ("memory", f"memory:{NANO}")
    named = [word for spec in specs for word in ("--baseline", spec)]
    arguments = ("--shots", "2", "--limit", "2", "--draws", "0", "--json")
    assert run(["evaluate", str(cups), *named, *arguments]) == 0
    found = json.loads(capsys.readouterr().out)["baselines"]
    assert list(found) == [f"memory bank of nano ({spec})" for spec in specs]


def test_a_table_in_percent_is_printed_without_json(cups, capsys):
    assert run(["evaluate", str(cups), "--draws", "0", "--limit", "4"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["img", "AUROC"]
    assert second.startswith("cup ")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "name a DATASET_DIR"),
        (["{cups}", "--answers"], 2, "give its --url"),
        (["{cups}", "--baseline", "magic"], 2, "known are clip, winclip, memory, patchcore"),
        (["{cups}", "--url", "http://127.0.0.1:9/v1", "--model", "{cups}"], 2, "leave out --model"),
        (["{cups}/train"], 1, "no known data set layout"),
        (["{cups}", "--url", "http://127.0.0.1:9/v1", "--decoder", EXPERT], 2, "leave out --model"),
        (["{cups}", "--model", "{cups}"], 1, "holds no config.json"),
        (["{cups}", "--decoder", EXPERT], 1, "expert.safetensors holds no decoder"),
        (["--answers", "--url", "x", "--questions", EXPERT], 2, "name a DATASET_DIR"),
        (["--baseline", "clip", "--url", "x", "--questions", EXPERT], 2, "name a DATASET_DIR"),
        (["{cups}", "--ask", "Is it?"], 2, "give --answers too"),
        (["{cups}", "--images", "{cups}"], 2, "give its FILE.json"),
        (["{cups}", "--judge", "http://127.0.0.1:9/v1"], 2, "give its FILE.json"),
        (
            ["--url", "x", "--questions", EXPERT, "--questions", str(NANO / "expert.json")],
            *(2, "two files are called expert; rename one"),
        ),
        (
            ["{cups}", "--baseline", "memory", "--baseline", "memory"],
            *(2, "--baseline memory is given twice"),
        ),
        (["{cups}", "--seed", "-1"], 2, "-1 is not in the range x>=0"),
        (["{cups}", "--shots", "9"], 1, "cup has 6 pictures in train/good"),
        (["{cups}", "--baseline", "memory"], 1, "the memory bank needs --shots 1 or more"),
        (["{cups}", "--url", "http://127.0.0.1:9/v1"], 1, "no answer from http://127.0.0.1:9/v1"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_an_exit_code(cups, capsys, arguments, code, says):
    assert run(["evaluate", *(word.format(cups=cups) for word in arguments)]) == code
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert says in error[0]
