"""A run: steps are logged, resumed to the same end, shared between processes."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import click
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from looktwice_adapters.train.run import Run, Schedule, TrainingError, refuse_overwriting
from looktwice_clients.cli import run as looktwice

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


def test_a_run_with_other_options_is_not_resumed_and_they_are_named(tmp_path):
    Run(Line(), SCHEDULE, tmp_path, {"seed": 0, "data": "a"}).train(inputs_at, "line")
    Run(Line(), replace(SCHEDULE, save_every=1), tmp_path, {"seed": 0, "data": "a"}).resume()
    longer = Run(Line(), replace(SCHEDULE, steps=9), tmp_path, {"seed": 1, "data": "a"})
    with pytest.raises(TrainingError, match=r"other options \(seed, steps\): --resume"):
        longer.resume()
    slower = Run(Line(), replace(SCHEDULE, accumulate=2), tmp_path, {"seed": 0, "data": "a"})
    with pytest.raises(TrainingError, match=r"other options \(batches a step\)"):
        slower.resume()


def test_the_log_tells_each_step_once_whatever_interrupted_it(tmp_path):
    Run(Line(), SCHEDULE, tmp_path).train(inputs_at, "line")
    log = tmp_path / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 3, "lo')  # a power cut
    Run(Line(), SCHEDULE, tmp_path).resume()
    assert log.read_text() == whole
    (tmp_path / "checkpoint.pt").unlink()  # interrupted before it was written
    Run(Line(), SCHEDULE, tmp_path).resume()
    assert log.read_text() == ""


def test_before_the_first_step_the_schedule_may_change_and_nothing_else(tmp_path):
    Run(Line(), replace(SCHEDULE, steps=0), tmp_path, {"seed": 0}).train(inputs_at, "line")
    Run(Line(), SCHEDULE, tmp_path, {"seed": 0}).resume()
    with pytest.raises(TrainingError, match=r"other options \(seed\)"):
        Run(Line(), SCHEDULE, tmp_path, {"seed": 1}).resume()


@pytest.mark.parametrize(("then", "now"), [({}, {"seed": 1}), ({"seed": 1}, {})])
def test_an_option_that_only_one_of_two_runs_knows_is_another_one(tmp_path, then, now):
    Run(Line(), SCHEDULE, tmp_path, then).train(inputs_at, "line")
    with pytest.raises(TrainingError, match=r"other options \(seed\)"):
        Run(Line(), SCHEDULE, tmp_path, now).resume()


def test_a_finished_folder_is_not_overwritten(tmp_path):
    Run(Line(), SCHEDULE, tmp_path).save()
    refuse_overwriting(tmp_path, resume=True)
    with pytest.raises(click.UsageError, match="--resume"):
        refuse_overwriting(tmp_path, resume=False)


def in_two_processes(script, *arguments):
    """What two processes of a script print."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = os.pathsep.join((".", os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [*launch, "--nproc-per-node=2", str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


EXPERT = """
import sys
from dataclasses import replace
from looktwice_adapters.train import expert as module

make = module.make_shards

def few(plan, count, workers):
    print("found", len(list(plan.folder.glob("shard-*"))), flush=True)
    return make(replace(plan, pairs=2), count, 1)

if __name__ == "__main__":
    module.make_shards = few
    options = ["--shards", "1", "--steps", "1", "--matchings", "1", "--out", sys.argv[1]]
    module.expert(options, standalone_mode=False)
"""
TOWER = """
import sys
from looktwice_adapters.train import tower as module

training = module.TowerTraining(layers=2, hidden_size=48, heads=1, taps=(1, 1, 2), batch=2)
module.TowerTraining = lambda seed: training
options = ["--pictures", sys.argv[2], "--steps", "1", "--out", sys.argv[1]]
module.tower(options, standalone_mode=False)
"""


def test_the_first_of_two_processes_makes_the_experts_data_and_writes_the_results(tmp_path):
    (tmp_path / "two.py").write_text(EXPERT)
    said = in_two_processes(tmp_path / "two.py", tmp_path / "out")
    assert [line for line in said if line.startswith("found")] == ["found 0", "found 1"]
    assert sum("expert.safetensors: expert" in line for line in said) == 1
    assert sorted(p.name for p in (tmp_path / "out" / "features").iterdir()) == [
        "plan.json",
        "shard-0000.pt",
    ]


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("synthesis", ("--columns", "0")),
        ("synthesis", ("--seed", "-1")),
        ("nano-assistant", ("--looks", "0")),
        ("nano-assistant", ("--seed", "-1")),
        ("tower", ("--seed", "-1")),
        ("expert", ("--seed", "-1")),
        ("decoder", ("--seed", "-1")),
        ("dialogue", ("--seed", "-1")),
        ("assistant", ("--seed", "-1")),
    ],
)
def test_a_number_that_cannot_be_is_refused_in_one_line(tmp_path, capsys, command, flags):
    assert looktwice(["train", command, "--out", str(tmp_path / "out"), *flags]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert f"'{flags[0]}': {flags[1]} is not in the range" in line


def test_the_first_of_two_processes_writes_the_tower(tmp_path):
    (tmp_path / "two.py").write_text(TOWER)
    pixels = np.random.default_rng(0).integers(0, 256, (130, 130, 3), np.uint8)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pixels).save(tmp_path / "pictures" / "noise.png")
    said = in_two_processes(tmp_path / "two.py", tmp_path / "out", tmp_path / "pictures")
    assert sum("tower.safetensors" in line for line in said) == 1


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
    in_two_processes(script, tmp_path / "run")
    ended = [path.read_text().split() for path in sorted(tmp_path.glob("ended-*"))]
    one = Line()
    Run(one, Schedule(3, 0.1, warmup=1, accumulate=2), tmp_path / "one").train(inputs_at, "line")
    assert [processes for processes, _ in ended] == ["2", "2"]
    assert [float(weight) for _, weight in ended] == pytest.approx([one.weight.item()] * 2)
