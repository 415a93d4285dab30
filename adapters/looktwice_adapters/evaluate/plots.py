"""A product's cases -> ROC curves, score histogram and calibration plot, as SVG data URIs."""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_auc_score, roc_curve

from looktwice_adapters.evaluate.product import Case
from looktwice_adapters.facts import THRESHOLD

SIZE = (3.4, 2.9)  # inches
NORMAL_COLOUR, ANOMALOUS_COLOUR = "#3b6fb6", "#c8553d"
BINS = 10
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
}


def roc_plot(judges: Mapping[str, Sequence[Case]]) -> str | None:
    """ROC curves of all judges on one product; None with one class only."""
    with rc_context(STYLE):
        figure, axes = _axes("false positive rate", "true positive rate")
        axes.plot([0, 1], [0, 1], color="#bbb", linewidth=0.8)
        for name, cases in judges.items():
            labels = [case.sample.anomalous for case in cases]
            if len(set(labels)) < 2:
                return None
            scores = [case.score for case in cases]
            false, true, _ = roc_curve(labels, scores)
            area = 100 * roc_auc_score(labels, scores)
            axes.plot(false, true, linewidth=1.3, label=f"{_short(name)} {area:.1f}")
        axes.set_title("ROC", loc="left")
        axes.legend(loc="lower right", frameon=False, fontsize=7)
        return _uri(figure)


def histogram(cases: Sequence[Case]) -> str:
    """Scores of normal and of anomalous pictures, with the threshold."""
    with rc_context(STYLE):
        figure, axes = _axes("score", "pictures")
        groups = [
            [case.score for case in cases if case.sample.anomalous is anomalous]
            for anomalous in (False, True)
        ]
        axes.hist(
            groups,
            bins=np.linspace(0, 1, 2 * BINS + 1).tolist(),
            color=[NORMAL_COLOUR, ANOMALOUS_COLOUR],
            label=["normal", "anomalous"],
        )
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.axvline(THRESHOLD, color="#333", linewidth=0.8, linestyle="--")
        axes.set_title("Scores", loc="left")
        axes.legend(frameon=False, fontsize=7)
        return _uri(figure)


def calibration_plot(cases: Sequence[Case]) -> str:
    """How many of the pictures with about a score are anomalous; point size by their number."""
    scores = np.array([case.score for case in cases])
    labels = np.array([case.sample.anomalous for case in cases])
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    used = [index for index in range(BINS) if (bins == index).any()]
    counts = np.array([(bins == index).sum() for index in used])
    with rc_context(STYLE):
        figure, axes = _axes("mean score", "share anomalous")
        axes.plot([0, 1], [0, 1], color="#bbb", linewidth=0.8)
        means = [scores[bins == index].mean() for index in used]
        shares = [labels[bins == index].mean() for index in used]
        axes.plot(means, shares, color="#444", linewidth=0.9)
        axes.scatter(means, shares, s=12 + 100 * counts / counts.sum(), color="#444")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.03, 1.03)
        axes.set_title("Calibration", loc="left")
        return _uri(figure)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"


def _uri(figure: Figure) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
