"""A run: steps are logged, resumed to the same end, shared between processes."""

import json
import os
import subprocess
import sys

import click
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from looktwice_adapters.train.run import Run, Schedule, TrainingError, refuse_overwriting

SCHEDULE = Schedule(8, 0.1, warmup=2, save_every=3, log_every=2)


class Line(torch.nn.Module):
    """y = w x, its loss the squared distance to y = 3 x; it has a frozen part too."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, 1))
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        return (self.weight * x - 3 * x).square().mean()


def inputs_at(index):
    return (torch.randn(4, generator=torch.Generator().manual_seed(index)),)


def test_a_resumed_run_equals_an_uninterrupted_one_in_weights_and_log(tmp_path):
    whole, parts = Line(), Line()
    Run(whole, SCHEDULE, tmp_path / "whole").train(inputs_at, "line")

    def power_cut(index):
        if index == 5:
            raise KeyboardInterrupt
        return inputs_at(index)

    with pytest.raises(KeyboardInterrupt):
        Run(parts, SCHEDULE, tmp_path / "parts").train(power_cut, "line")
    parts = Line()
    run = Run(parts, SCHEDULE, tmp_path / "parts")
    run.resume()
    assert run.step == 3
    run.train(inputs_at, "line")

    assert torch.equal(whole.weight, parts.weight)
    assert 0 < whole.weight.item() < 3
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    steps, again = ([json.loads(line)["step"] for line in log] for log in logs)
    assert steps == again == [2, 4, 6, 8]


def test_tensorboard_shows_what_the_log_says(tmp_path):
    Run(Line(), SCHEDULE, tmp_path).train(inputs_at, "line")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for tag, key in (
        ("loss", "loss"),
        ("learning_rate", "learning_rate"),
        ("norm", "gradient_norm"),
    ):
        shown = events.Scalars(f"line/{tag}")
        assert [event.step for event in shown] == [line["step"] for line in logged]
        assert [event.value for event in shown] == pytest.approx([line[key] for line in logged])


def test_the_checkpoint_holds_what_learns_and_not_what_is_frozen(tmp_path):
    Run(Line(), SCHEDULE, tmp_path).train(inputs_at, "line")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert list(state["model"]) == ["weight"]


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path):
    small, large = Line(), Line()
    schedule = Schedule(3, 0.1, warmup=1, accumulate=2)
    Run(small, schedule, tmp_path / "small").train(inputs_at, "line")

    def both(step):
        return (torch.cat([inputs_at(2 * step)[0], inputs_at(2 * step + 1)[0]]),)

    Run(large, Schedule(3, 0.1, warmup=1), tmp_path / "large").train(both, "line")
    torch.testing.assert_close(small.weight, large.weight)


def test_a_loss_that_is_no_number_ends_the_run_with_its_step(tmp_path):
    def broken(index):
        return (inputs_at(index)[0] / (0 if index == 2 else 1),)

    with pytest.raises(TrainingError, match="at step 2"):
        Run(Line(), SCHEDULE, tmp_path).train(broken, "line")


def test_another_models_checkpoint_is_not_resumed(tmp_path):
    Run(torch.nn.Linear(2, 1), SCHEDULE, tmp_path).save()
    with pytest.raises(TrainingError, match="other options"):
        Run(Line(), SCHEDULE, tmp_path).resume()


def test_a_finished_folder_is_not_overwritten(tmp_path):
    Run(Line(), SCHEDULE, tmp_path).save()
    refuse_overwriting(tmp_path, resume=True)
    with pytest.raises(click.UsageError, match="--resume"):
        refuse_overwriting(tmp_path, resume=False)


def test_two_processes_share_the_batches_and_end_like_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from tests.adapters.test_train_run import Line, inputs_at\n"
        "from looktwice_adapters.train.run import Run, Schedule\n"
        "line = Line()\n"
        "run = Run(line, Schedule(3, 0.1, warmup=1), Path(sys.argv[1]))\n"
        "run.train(inputs_at, 'line')\n"
        "of = run.accelerator\n"
        "ended = Path(sys.argv[1]).parent / f'ended-{of.process_index}'\n"
        "ended.write_text(f'{of.num_processes} {line.weight.item()}')\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc-per-node=2", str(script), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ended = [path.read_text().split() for path in sorted(tmp_path.glob("ended-*"))]
    one = Line()
    Run(one, Schedule(3, 0.1, warmup=1, accumulate=2), tmp_path / "one").train(inputs_at, "line")
    assert [processes for processes, _ in ended] == ["2", "2"]
    assert [float(weight) for _, weight in ended] == pytest.approx([one.weight.item()] * 2)
