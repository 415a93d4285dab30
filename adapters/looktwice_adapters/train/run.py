"""A training run: a model that gives its loss -> a folder with checkpoint, log and TensorBoard.

Every `looktwice train` command that is interrupted goes on from its last checkpoint with
`--resume`; batches depend on the seed and the step alone, so that it sees what it would have seen.
`accelerate` finds the device; started by `accelerate launch`, each process takes its own batches
and gradients are averaged (data parallel).
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    send_to_device,
)
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from looktwice_adapters.train.draft import draft_of
from looktwice_adapters.train.options import changed

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


class TrainingError(ValueError):
    """The run cannot go on, and why."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a run learns."""

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    save_every: int = 100
    log_every: int = 20
    accumulate: int = 1  # batches of a process whose gradients make one step

    def factor(self, step: int) -> float:
        """Share of the learning rate at a step: linear warm-up, then half a cosine to 2 %."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def optimizer_for(model: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves vectors (norms, biases, newline) alone."""
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98))


def refuse_overwriting(folder: Path, resume: bool) -> None:
    """Do not start over in a folder that holds another run's checkpoint.

    Raises:
        click.UsageError: it does, and `--resume` was not given.
    """
    if not resume and (folder / CHECKPOINT).exists():
        raise click.UsageError(
            f"{folder} holds a run already: --resume goes on with it, or choose another --out"
        )


def all_processes() -> Accelerator:
    """The processes of `accelerate launch`, or this one; the first makes data, the others wait."""
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))])


class Run:
    """One run in one folder: checkpoint.pt (what learns, its optimizer, the step, the options),
    log.jsonl and tensorboard/.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        folder: Path,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """Move the model, whose `forward` gives a loss, to its device; `resume` reads the folder.

        Args:
            model: what learns, and what is frozen.
            schedule: how long and how fast.
            folder: of this run alone.
            settings: what else its steps depend on, such as the seed; plain values, by name.

        Raises:
            TrainingError: `accelerate` was configured to shard the model.
        """
        self.schedule, self.folder, self.settings = schedule, folder, settings or {}
        # Frozen or unused parts (a projector in a batch without pictures) get no gradient.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(kwargs_handlers=[unused])
        if self.accelerator.distributed_type not in DATA_PARALLEL:
            raise TrainingError(
                f"this trains data parallel, not by {self.accelerator.distributed_type.value}; "
                "run `accelerate config` again without sharding"
            )
        self.model = model
        self.replica: nn.Module = self.accelerator.prepare_model(model)
        self.optimizer = optimizer_for(model, schedule)
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> None:
        """Go on from the folder's checkpoint, if it has one.

        Before the first step the schedule may be another one.

        Raises:
            TrainingError: the checkpoint is another model's, or was made with other options.
        """
        path = self.folder / CHECKPOINT
        if not path.exists():
            self._forget_later_steps()
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        if others := self._changed(state):
            names = ", ".join(others)
            raise TrainingError(
                f"{path} is a run with other options ({names}): --resume needs the same ones"
            )
        if state["model"].keys() != self._learnt().keys():
            raise TrainingError(f"{path} is a run with other options: --resume needs the same ones")
        self.model.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self._forget_later_steps()

    def _changed(self, state: dict[str, Any]) -> list[str]:
        """Names of the options that differ from a checkpoint's."""
        then, now = state.get("settings", {}), dict(self.settings)
        if state["step"]:
            then, now = then | state.get("schedule", {}), now | self._pace()
        return changed(then, now)

    def _pace(self) -> dict[str, float]:
        """The part of the schedule that the weights depend on."""
        pace = asdict(self.schedule)
        del pace["save_every"], pace["log_every"]
        pace["batches a step"] = pace.pop("accumulate") * self.accelerator.num_processes
        return pace

    def _learnt(self) -> dict[str, Tensor]:
        """The model's state without frozen parameters, which come from elsewhere."""
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        return {name: v for name, v in self.model.state_dict().items() if name not in frozen}

    def _forget_later_steps(self) -> None:
        """Drop lines that were logged after the checkpoint: these steps are made again."""
        path = self.folder / LOG
        if path.exists() and self.accelerator.is_main_process:
            lines = path.read_text().splitlines(keepends=True)
            with draft_of(path) as draft:
                draft.write_text("".join(filter(self._is_known, lines)))

    def _is_known(self, line: str) -> bool:
        """Whether a line of the log is whole and of a step up to now."""
        try:
            return bool(json.loads(line)["step"] <= self.step)
        except ValueError:  # written in the moment of a power cut
            return False

    def save(self) -> None:
        """Write the checkpoint beside its old one, then put it in its place."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "model": self._learnt(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "schedule": self._pace(),
            "settings": self.settings,
        }
        with draft_of(self.folder / CHECKPOINT) as draft:
            torch.save(state, draft)

    def update(self, inputs_at: Callable[[int], tuple[Any, ...]]) -> tuple[float, float]:
        """One step of the optimizer: the mean loss of its batches, and the gradient's norm.

        Raises:
            TrainingError: the loss is not a number.
        """
        rate = self.schedule.learning_rate * self.schedule.factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.accelerator.device)
        parts = self.schedule.accumulate
        for part in range(parts):
            index = self.step * parts + part
            index = index * self.accelerator.num_processes + self.accelerator.process_index
            inputs = send_to_device(inputs_at(index), self.accelerator.device)
            last = part == parts - 1
            with nullcontext() if last else self.accelerator.no_sync(self.replica):
                loss = self.replica(*inputs) / parts
                loss.backward()
            total += loss.detach()
        mean = float(self.accelerator.reduce(total, "mean"))
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss is {mean} at step {self.step}: go on from the last checkpoint with a "
                "lower learning rate"
            )
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip))
        self.optimizer.step()
        self.step += 1
        return mean, norm

    def train(self, inputs_at: Callable[[int], tuple[Any, ...]], name: str) -> None:
        """Run to the last step.

        Args:
            inputs_at: the model's arguments by the number of the batch, and by that alone. One
                process without accumulation makes one batch a step.
            name: what the progress bar shows.
        """
        self.model.train()
        began, recent = time.monotonic(), list[float]()
        main = self.accelerator.is_main_process
        writer = SummaryWriter(self.folder / "tensorboard", purge_step=self.step) if main else None
        with tqdm(
            total=self.schedule.steps, initial=self.step, desc=name, unit="step", disable=not main
        ) as bar:
            while self.step < self.schedule.steps:
                loss, norm = self.update(inputs_at)
                recent.append(loss)
                bar.update()
                if writer and self.step % self.schedule.log_every == 0:
                    mean, rate = sum(recent) / len(recent), self.optimizer.param_groups[0]["lr"]
                    bar.set_postfix(loss=f"{mean:.3f}")
                    seconds = round(time.monotonic() - began, 1)
                    self.log(loss=mean, learning_rate=rate, gradient_norm=norm, seconds=seconds)
                    for tag, value in (("loss", mean), ("learning_rate", rate), ("norm", norm)):
                        writer.add_scalar(f"{name}/{tag}", value, self.step)
                    recent.clear()
                if self.step % self.schedule.save_every == 0:
                    self.save()
        if writer:
            writer.close()
        self.save()
        self.accelerator.wait_for_everyone()

    def log(self, **values: float | str) -> None:
        """Append a line to the folder's log."""
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")
