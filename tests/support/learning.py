"""Data and settings for tests of learners."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mulligan.trainer.data import Datum, Distillation, PolicyGradient
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.settings import LearnerServerSettings, LearnerSpec
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import LoraSettings, OptimizerSettings, TrainedModelSettings
from tests.support.tiny_model import VOCABULARY_SIZE

PLAIN = ppo.Settings(kl_coefficient=0.0)
FULL = None
LORA = LoraSettings(rank=2)


def server_settings(folder: Path, **changes: object) -> LearnerServerSettings:
    values = {"weights_folder": folder / "weights", "checkpoint_folder": folder / "checkpoints", "threads": 1}
    values["models_folder"] = Path("/")
    return LearnerServerSettings(**(values | changes))  # type: ignore[arg-type]


def spec(
    model: Path, lora: LoraSettings | None = None, *, learning_rate: float = 1e-2, **changes: object
) -> LearnerSpec:
    optimizer = OptimizerSettings(learning_rate=learning_rate)
    return LearnerSpec(TrainedModelSettings(source=str(model), lora=lora), optimizer, **changes)  # type: ignore[arg-type]


def sampled(
    datum_id: str = "sampled",
    tokens: Sequence[int] = (2, 3, 4, 5, 6, 7),
    trained: Sequence[int] = (3, 4),
    *,
    advantage: float = 1.0,
    rollout: Sequence[float] | None = None,
    old: Sequence[float] = (),
    weight: float = 1.0,
    temperature: float = 1.0,
    branch: str = "first",
) -> Datum:
    mask = tuple(index in trained for index in range(len(tokens)))
    log_probs = tuple(rollout) if rollout is not None else (-3.0,) * len(trained)
    objective = PolicyGradient(advantage, log_probs, tuple(old))
    return Datum(datum_id, tuple(tokens), mask, weight, temperature, objective, branch)


def distilled(
    datum_id: str = "distilled",
    tokens: Sequence[int] = (2, 3, 4, 5, 6, 7),
    trained: Sequence[int] = (3, 4),
    *,
    target_weight: float = 1.0,
    weight: float = 1.0,
) -> Datum:
    mask = tuple(index in trained for index in range(len(tokens)))
    return Datum(datum_id, tuple(tokens), mask, weight, 1.0, Distillation(target_weight), "distilled")


def many(count: int, seed: int = 0) -> list[Datum]:
    """Data of all branches and of different lengths."""
    rng = random.Random(seed)
    data: list[Datum] = []
    for index in range(count):
        length = rng.randint(4, 40)
        tokens = [rng.randrange(VOCABULARY_SIZE) for _ in range(length)]
        trained = sorted(rng.sample(range(1, length), rng.randint(1, length // 2)))
        if index % 3 == 2:
            data.append(distilled(f"d{index}", tokens, trained, weight=1 / count))
        else:
            rollout = [-rng.uniform(1, 5) for _ in trained]
            branch, temperature = ("first", 1.0) if index % 3 else ("reflection", 0.7)
            advantage = rng.choice([-1.0, 0.0, 0.5, 2.0])
            data.append(
                sampled(
                    f"d{index}",
                    tokens,
                    trained,
                    advantage=advantage,
                    rollout=rollout,
                    weight=1 / count,
                    temperature=temperature,
                    branch=branch,
                )
            )
    return data


def make(
    tiny: Path, folder: Path, lora: LoraSettings | None = None, *, name: str = "learner", **changes: Any
) -> Learner:
    return Learner(name, spec(tiny, lora, deterministic=True, **changes), server_settings(folder))


def learn(learner: Learner, steps: range) -> None:
    for step in steps:
        learner.forward_backward(many(6, seed=step), PLAIN)
        learner.optim_step()


def weights_digest(learner: Learner) -> str:
    """Of every bit of the trained weights."""
    digest = hashlib.sha256()
    for name, parameter in sorted(learner.model.trainable.items()):
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()
