"""`looktwice evaluate`: data set folders -> a table of figures, JSON, CSV and an HTML report."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from looktwice_adapters.datasets import Sample
    from looktwice_adapters.evaluate.judge import Judge
    from looktwice_adapters.evaluate.product import Asked
    from looktwice_adapters.evaluate.results import Row

NANO = "models/nano"
CHECKOUT = Path(__file__).resolve().parents[3]


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
    help=f"Checkpoint folder whose expert is measured in process.  [default: {NANO}]",
)
@click.option("--url", help="Measure a running server instead, such as http://127.0.0.1:8000/v1.")
@click.option("--answers", is_flag=True, help="Also ask --url about each picture, yes or no.")
@click.option(
    "--shots",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Normal reference pictures of each product, from train/good or, without one, test/good.",
)
@click.option("--limit", type=click.IntRange(1), help="At most this many test pictures a product.")
@click.option("--seed", default=0, show_default=True, help="What --shots and --limit draw.")
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
    "winclip[:MODEL@WEIGHTS] (open_clip), patchcore[:NETWORK], padim[:NETWORK] (timm, with "
    "--shots), openai:URL[#MODEL] (any vision model).",
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
    url: str | None,
    answers: bool,
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
    unpacked, one product of such a set, or your own pictures in MVTec AD's layout:
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
    if url and model:
        raise click.UsageError("--url measures the server's model: leave out --model")
    _check_baselines(baselines)
    import openai

    from looktwice_adapters.checkpoint import ExpertFileError
    from looktwice_adapters.evaluate.chat import one_line
    from looktwice_adapters.evaluate.results import Report, table, write_csv

    settings: dict[str, Any] = {
        "model": str(url or model or NANO), "shots": shots, "limit": limit, "seed": seed,
        "draws": draws,
    }  # fmt: skip
    try:
        ours, others = None, []
        if datasets:
            products = _read(datasets, shots, limit, seed)
            ours = _row(_our_judge(model, url), products, draws, _asker(url) if answers else None)
            others = [_baseline_row(spec, seed, products, draws) for spec in baselines]
        reasoning = dict(_asked(questions, images, url or "", marker, out))
    except openai.APIError as error:
        raise click.ClickException(one_line(error, url or "")) from error
    except (ExpertFileError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    report = Report(ours, tuple(others), reasoning, settings)
    if out is not None:
        from looktwice_adapters.evaluate.report import write_html

        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(report.as_json(), indent=1))
        write_csv(report, out)
        write_html(report, out / "report.html")
    click.echo(json.dumps(report.as_json()) if as_json else table(report))
    problems = [f"{row.name} was not run: {row.problem}" for row in others if row.problem]
    if problems:
        raise click.ClickException("; ".join(problems))


Products = dict[str, dict[str, tuple[list["Sample"], list["Sample"]]]]


def _read(datasets: tuple[Path, ...], shots: int, limit: int | None, seed: int) -> Products:
    """Set -> product -> its references and its test pictures."""
    from dataclasses import replace

    from looktwice_adapters.evaluate.judge import drawn, split
    from looktwice_adapters.layouts import read_dataset

    found: Products = {}
    for root in (path.resolve() for path in datasets):
        products = found.setdefault(root.name, {})
        for name, samples in read_dataset(root).items():
            label = name if name == root.name else f"{root.name}/{name}"
            named = [replace(sample, product=label) for sample in samples]
            references, test = split(named, shots, seed)
            products[label] = references, drawn(test, limit, seed)
    return found


def _our_judge(model: Path | None, url: str | None) -> "Judge":
    if url:
        from looktwice_adapters.evaluate.server import ServerJudge

        return ServerJudge(url)
    from looktwice_adapters.evaluate.detector import ExpertJudge

    return ExpertJudge(model or _nano())


def _nano() -> Path:
    """The shipped checkpoint: here, under $LOOKTWICE_MODELS, or in the source checkout."""
    homes = [Path(NANO), CHECKOUT / NANO]
    if os.environ.get("LOOKTWICE_MODELS"):
        homes.insert(1, Path(os.environ["LOOKTWICE_MODELS"]) / "nano")
    for home in homes:
        if home.is_dir():
            return home
    raise ValueError(f"there is no {NANO} here: give --model or --url")


def _asker(url: str | None) -> "Callable[[Sample], Asked]":
    from looktwice_adapters.evaluate.chat import DEFECT_QUESTION, Chat
    from looktwice_adapters.train.agreement import said_yes

    chat = Chat(url or "")

    def ask(sample: "Sample") -> "Asked":
        words = chat.ask(DEFECT_QUESTION, [sample])
        return words, said_yes(words)

    return ask


def _row(
    judge: "Judge",
    products: Products,
    draws: int,
    ask: "Callable[[Sample], Asked] | None" = None,
) -> "Row":
    from looktwice_adapters.evaluate.product import measure, run_product
    from looktwice_adapters.evaluate.results import Row

    try:
        return Row(
            judge.name,
            {
                set_name: {
                    name: measure(run_product(judge, test, references, ask), draws)
                    for name, (references, test) in members.items()
                }
                for set_name, members in products.items()
            },
        )
    finally:
        judge.close()


def _check_baselines(baselines: tuple[str, ...]) -> None:
    from looktwice_adapters.evaluate.baselines import BASELINES

    for spec in baselines:
        if spec.partition(":")[0] not in BASELINES:
            raise click.UsageError(f"--baseline {spec}: known are {', '.join(BASELINES)}")


def _baseline_row(spec: str, seed: int, products: Products, draws: int) -> "Row":
    """Its figures, or the row that says why there are none."""
    from looktwice_adapters.evaluate.baselines import BaselineError, baseline
    from looktwice_adapters.evaluate.judge import ReferencesError
    from looktwice_adapters.evaluate.results import Row

    try:
        return _row(baseline(spec, seed), products, draws)
    except (BaselineError, ReferencesError) as error:
        return Row(spec, problem=str(error))


def _asked(
    questions: tuple[Path, ...],
    images: Path | None,
    url: str,
    marker: str | None,
    out: Path | None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """File name -> figures; the answers themselves go to `out`."""
    from dataclasses import asdict

    from looktwice_adapters.evaluate.chat import Chat
    from looktwice_adapters.evaluate.multiple_choice import (
        ask_choices,
        choice_figures,
        read_choices,
    )
    from looktwice_adapters.evaluate.reasoning import (
        ask_dialogues,
        read_dialogues,
        reasoning_figures,
    )

    for path in questions:
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        folder = images or path.parent
        judge: Chat | None = None
        if marker:
            address, _, name = marker.partition("#")
            judge = Chat(address, name or None)
        if isinstance(content, dict):
            chosen = ask_choices(Chat(url), read_choices(content), folder)
            figures, said = choice_figures(chosen), [asdict(one) for one in chosen]
        else:
            replies = ask_dialogues(Chat(url), read_dialogues(content), folder, judge)
            figures, said = reasoning_figures(replies), [asdict(one) for one in replies]
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{path.stem}_answers.json").write_text(json.dumps(said, indent=1))
        yield path.name, figures
