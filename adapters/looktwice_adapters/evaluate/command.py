"""`looktwice evaluate`: data set folders -> a table of figures, JSON, CSV and an HTML report."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

QUESTION = "Is there a defect in this picture?"


@click.command()
@click.argument(
    "datasets",
    nargs=-1,
    metavar="[DATASET_DIR]...",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Checkpoint folder whose expert is measured in process.  [default: nano, as it is served]",
)
@click.option(
    "--decoder",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="AnomalyGPT's decoder for --model, that `looktwice train decoder` wrote: it judges in the "
    "expert's place.",
)
@click.option("--url", help="Measure a running server instead, such as http://127.0.0.1:8000/v1.")
@click.option("--answers", is_flag=True, help="Also ask --url about each picture, yes or no.")
@click.option(
    "--ask",
    "question",
    help=f"What --answers asks; yes must mean a defect.  [default: {QUESTION}]",
)
@click.option(
    "--shots",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Normal reference pictures of each product, from train/good or, without one, test/good; "
    "with --questions the first that MMAD's file names.",
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    help="At most this many test pictures a product, and pictures a file of questions.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="What --shots and --limit draw.",
)
@click.option(
    "--draws",
    type=click.IntRange(0),
    default=1000,
    show_default=True,
    help="Bootstrap draws for the 95 % intervals; 0 for none.",
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="NAME[:WITH]",
    help="Measure beside it, several times if you like: clip[:MODEL@WEIGHTS], "
    "winclip[:MODEL@WEIGHTS] (open_clip), memory[:CHECKPOINT], patchcore[:NETWORK], "
    "padim[:NETWORK] (timm; these three with --shots), openai:URL[#MODEL] (any vision model).",
)
@click.option(
    "--questions",
    multiple=True,
    metavar="FILE.json",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Ask --url the questions of a benchmark: MMAD's multiple choice, or VisA-D&R's dialogues.",
)
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the pictures that --questions name lie.  [default: the file's folder]",
)
@click.option(
    "--judge",
    "marker",
    metavar="URL[#MODEL]",
    help="A language model that marks the answers to VisA-D&R's questions.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write metrics.json, metrics.csv, images.csv and report.html into this folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def evaluate(
    datasets: tuple[Path, ...],
    model: Path | None,
    decoder: Path | None,
    url: str | None,
    answers: bool,
    question: str | None,
    shots: int,
    limit: int | None,
    seed: int,
    draws: int,
    baselines: tuple[str, ...],
    questions: tuple[Path, ...],
    images: Path | None,
    marker: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure how well defects are found, located and talked about.

    A DATASET_DIR is MVTec AD, VisA, AITEX, ELPV, BTAD, MPDD, BrainMRI, HeadCT or Br35H as it is
    unpacked, one product's folder of MVTec AD, VisA, MPDD or BTAD, or your own pictures in MVTec
    AD's layout:
    test/good/, test/<defect>/ and, where there are masks, ground_truth/<defect>/NAME_mask.png.

    \b
    looktwice evaluate MVTec/ VisA/ --out report/
    looktwice evaluate mine/ --shots 4 --baseline patchcore --baseline padim
    looktwice evaluate mine/ --url http://127.0.0.1:8000/v1 --answers
    looktwice evaluate --url http://127.0.0.1:8000/v1 --questions mmad.json --images MMAD/

    `shortcut` is the AUROC of the best trivial statistic (mean brightness, contrast, gradient
    energy, bytes per pixel): a figure that is not well above it says little.
    """
    if not datasets and not questions:
        raise click.UsageError("name a DATASET_DIR, or --questions FILE.json")
    if (answers or questions) and not url:
        raise click.UsageError("--answers and --questions ask a server: give its --url")
    if url and (model or decoder):
        raise click.UsageError("--url measures what the server runs: leave out --model, --decoder")
    if (answers or baselines) and not datasets:
        raise click.UsageError("--answers and --baseline need a data set: name a DATASET_DIR")
    if question is not None and not answers:
        raise click.UsageError("--ask says what --answers asks: give --answers too")
    question = question or QUESTION
    if (images or marker) and not questions:
        raise click.UsageError("--images and --judge need --questions: give its FILE.json")
    if same := _twice([path.stem for path in questions]):
        raise click.UsageError(f"--questions: two files are called {same}; rename one")
    if same := _twice(baselines):
        raise click.UsageError(f"--baseline {same} is given twice")
    from looktwice_adapters.evaluate.baselines import BASELINES

    for spec in baselines:
        if spec.partition(":")[0] not in BASELINES:
            raise click.UsageError(f"--baseline {spec}: known are {', '.join(BASELINES)}")
    from looktwice_adapters.checkpoint import ExpertFileError
    from looktwice_adapters.detector import shipped_checkpoint
    from looktwice_adapters.evaluate import run
    from looktwice_adapters.evaluate.chat import Chat
    from looktwice_adapters.evaluate.expert import ExpertJudge
    from looktwice_adapters.evaluate.results import Report, table, write_csv
    from looktwice_adapters.evaluate.server import ServerJudge

    ours, others, reasoning, said = None, [], {}, {}
    settings: dict[str, Any] = {"looktwice": version("looktwice")}
    try:  # whatever can be refused, before anything is measured
        asked = [
            run.read_questions(path, images or path.parent, shots, limit, seed)
            for path in questions
        ]
        products = run.read_products(datasets, shots, limit, seed)
        chat = Chat(url) if url and (answers or questions) else None
        marks = Chat.at(marker) if marker else None
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        folder = None if url else (model or shipped_checkpoint()).resolve()
        settings["model"] = url or str(folder)
        settings["decoder"] = decoder and str(decoder.resolve())
        settings["ask"] = question if answers else None
        judge: ExpertJudge | ServerJudge | None = None
        if datasets:
            judge = ExpertJudge(folder, decoder) if folder else ServerJudge(str(url))
    except (ExpertFileError, *run.EXPECTED) as error:
        raise click.ClickException(run.in_words(error)) from error
    if judge is not None:
        ask = None
        if chat and answers and isinstance(judge, ServerJudge):
            ask = run.yes_or_no(chat, question, judge)
        ours = run.judge_row(judge, products, draws, ask)
        settings["expert"] = judge.expert
        rows = [run.baseline_row(spec, seed, products, draws) for spec in baselines]
        others = run.told_apart(ours, rows, baselines)
    for file in asked:
        assert chat is not None  # --questions without --url was refused
        against = url if shots and file.choices else None
        figures, replies = run.ask_questions(file, chat, marks, against)
        reasoning[file.name], said[Path(file.name).stem] = figures, replies
    settings |= {"shots": shots, "limit": limit, "seed": seed, "draws": draws}
    report = Report(ours, tuple(others), reasoning, settings)
    shown = json.dumps(report.as_json()) if as_json else table(report)
    click.echo(shown.encode("utf-8", "backslashreplace").decode())  # a name need not be UTF-8
    if out is not None:
        from looktwice_adapters.evaluate.report import write_html

        (out / "metrics.json").write_text(json.dumps(report.as_json(), indent=1))
        for name, answered in said.items():
            (out / f"{name}_answers.json").write_text(json.dumps(answered, indent=1))
        write_csv(report, out)
        write_html(report, out / "report.html")
    if report.problems:
        raise click.ClickException("; ".join(report.problems))


def _twice(names: Sequence[str]) -> str | None:
    """The first name that comes a second time, if any does."""
    return next((name for i, name in enumerate(names) if name in names[:i]), None)
