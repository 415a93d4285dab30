"""A training run: steps of a loss -> a folder with a checkpoint, a log, and a way to resume.

Every `looktwice train` command that is interrupted goes on from its last checkpoint with
`--resume`; batches depend on the seed and the step alone, so that it sees what it would have seen.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm


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


class Run:
    """One run in one folder: `checkpoint.pt` (model, optimizer, step) and `log.jsonl`."""

    def __init__(self, model: nn.Module, schedule: Schedule, folder: Path) -> None:
        """Prepare the folder and the optimizer; nothing is read until `resume`."""
        self.model, self.schedule, self.folder = model, schedule, folder
        self.optimizer = optimizer_for(model, schedule)
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> None:
        """Go on from the folder's checkpoint, if it has one."""
        path = self.folder / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def save(self) -> None:
        """Write the checkpoint beside its old one, then put it in its place."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        draft = self.folder / "checkpoint.pt.draft"
        torch.save(state, draft)
        draft.replace(self.folder / "checkpoint.pt")

    def update(self, loss: Tensor) -> None:
        """One step of the optimizer on this loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate * self.schedule.factor(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip)
        self.optimizer.step()
        self.step += 1

    def train(self, loss_at: Callable[[int], Tensor], name: str) -> None:
        """Run to the last step. `loss_at(step)` makes that step's batch and gives its loss."""
        self.model.train()
        began, recent = time.monotonic(), list[float]()
        with tqdm(total=self.schedule.steps, initial=self.step, desc=name, unit="step") as bar:
            while self.step < self.schedule.steps:
                loss = loss_at(self.step)
                self.update(loss)
                recent.append(loss.item())
                bar.update()
                if self.step % self.schedule.log_every == 0:
                    mean = sum(recent) / len(recent)
                    bar.set_postfix(loss=f"{mean:.3f}")
                    self.log(loss=mean, seconds=round(time.monotonic() - began, 1))
                    recent.clear()
                if self.step % self.schedule.save_every == 0:
                    self.save()
        self.save()

    def log(self, **values: float | str) -> None:
        """Append a line to the folder's log."""
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")
