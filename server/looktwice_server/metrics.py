"""What `/metrics` counts beside vLLM's own figures."""

from prometheus_client import Counter, Histogram

INSPECTIONS = Counter(
    "looktwice_inspections", "Inspections answered, by route and verdict.", ["route", "verdict"]
)
SCORES = Histogram(
    "looktwice_score",
    "Calibrated anomaly score of the pictures inspected, each once, by the product compared with.",
    ["product"],
    buckets=[tenth / 10 for tenth in range(1, 11)],
)
CONVERSATION = "(conversation)"  # the product where its own pictures are compared with; no name
EXPERT_SECONDS = Histogram(
    "looktwice_expert_seconds",
    "Time of one call to the worker: towers and expert for a batch of pictures.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
