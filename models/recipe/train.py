"""Trains the embedded model: first on short games, to learn reading a legend cheaply, then on whole episodes.

A helper head predicts two things from the middle layer at each board cell: its role, while a legend is in context, and
in a trace the change since the board before. Both are then learned hundreds of batches sooner. The head is not kept.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3ForCausalLM

from mulligan.models.recipe.optimizer import Optimizer
from mulligan.models.recipe.play import play_batch
from mulligan.models.recipe.reflections import CELL_CLASSES, reflection_batch, retry_batch
from mulligan.models.recipe.tokens import Batch

_HELPER_LAYER = 2
_TOKENS_PER_TURN = 17


@dataclass(frozen=True)
class Schedule:
    steps: int = 900
    seed: int = 0
    short_share: float = 0.2  # of the steps, with games of one and two turns and no legends to write
    learning_rate: float = 3e-3
    warmup: int = 30
    play_tokens: int = 5_500  # a step
    reflections: int = 36

    def rate(self, step: int) -> float:
        rising = min(1.0, (step + 1) / self.warmup)
        return self.learning_rate * rising * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / self.steps)))


# What is learned in a step of a schedule: batches with the names of their figures.
Lesson = Callable[[np.random.Generator, Schedule, int], Iterator[tuple[Batch, str]]]


def lesson(rng: np.random.Generator, schedule: Schedule, step: int) -> Iterator[tuple[Batch, str]]:
    """Of the embedded model."""
    short = step < schedule.short_share * schedule.steps
    turns = int(rng.choice((1, 2))) if short else int(rng.choice((1, 2, 3, 4, 8)))
    rows = max(4, schedule.play_tokens // (16 + _TOKENS_PER_TURN * turns))
    yield play_batch(rng, rows, turns, legend_share=0.85), "play"
    if not short:
        yield reflection_batch(rng, schedule.reflections), "write"
        if step % 4 == 0:
            yield retry_batch(rng, schedule.reflections // 4), "retry"


class Warmup:
    def __init__(self, model: Qwen3ForCausalLM, schedule: Schedule, lesson: Lesson = lesson) -> None:
        self.model = model
        self.schedule = schedule
        self.lesson = lesson
        with torch.random.fork_rng():
            torch.manual_seed(schedule.seed)
            self.helper = nn.Linear(model.config.hidden_size, CELL_CLASSES)
        self.optimizer = Optimizer(model, self.helper)
        self.rng = np.random.default_rng(schedule.seed)
        self.tokens = 0
        self.figures: dict[str, list[float]] = defaultdict(list)

    def run(self, report: Callable[[str], None], every: int = 25, save: Callable[[int], None] | None = None) -> None:
        started = time.monotonic()
        for step in range(self.schedule.steps):
            self._step(step)
            if (step + 1) % every == 0 or step + 1 == self.schedule.steps:
                means = " ".join(f"{name} {np.mean(values):.3f}" for name, values in sorted(self.figures.items()))
                report(f"step {step + 1}/{self.schedule.steps} {time.monotonic() - started:.0f}s {means}")
                self.figures.clear()
                if save is not None:
                    save(step + 1)

    def _step(self, step: int) -> None:
        for batch, name in self.lesson(self.rng, self.schedule, step):
            self._learn(batch, name)
        self.optimizer.step(self.schedule.rate(step))

    def _learn(self, batch: Batch, name: str) -> None:
        self.tokens += batch.tokens.size
        tokens = torch.from_numpy(np.ascontiguousarray(batch.tokens))
        output = self.model.model(input_ids=tokens, use_cache=False, output_hidden_states=True)
        at = torch.from_numpy(batch.at)
        weights = torch.from_numpy(batch.weights)
        log_chances = F.log_softmax(self.model.lm_head(output.last_hidden_state[at[:, 0], at[:, 1]]), dim=-1)
        targets = torch.from_numpy(batch.targets)
        divergence = F.kl_div(log_chances, targets, reduction="none").sum(dim=-1)
        loss = (divergence * weights).sum() / weights.sum()
        self.figures[f"{name}_loss"].append(loss.item())
        decided = (weights == 1) & (targets.max(dim=-1).values > 0.3)
        within = ((targets > 0) * log_chances.exp()).sum(dim=-1)
        if decided.any():
            self.figures[f"{name}_right"].append(within[decided].mean().item())
        if len(batch.cells_at):
            helper_loss = self._helper_loss(output.hidden_states[_HELPER_LAYER], batch)
            self.figures[f"{name}_cells_loss"].append(helper_loss.item())
            loss = loss + helper_loss
        loss.backward()

    def _helper_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        at = torch.from_numpy(batch.cells_at)
        cells = F.rms_norm(hidden[at[:, 0], at[:, 1]], (hidden.shape[-1],))
        return F.cross_entropy(self.helper(cells), torch.from_numpy(batch.cell_classes))
