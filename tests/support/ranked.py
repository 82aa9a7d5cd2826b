"""A learner in two processes (`torchrun -m tests.support.ranked WORK FOLDER`), and the same work in one.

`learn` takes four optimizer steps in float64, and saves. `reshard` loads what one process saved, and saves again. Both
are done with full weights in FOLDER/full and with an adapter in FOLDER/lora. There the first process writes what it
has.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor

from mulligan.trainer.data import Datum
from mulligan.trainer.learner import model as model_module
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.optimizer import split
from mulligan.trainer.learner.ranks import Ranks
from mulligan.trainer.learner.sharding import whole
from mulligan.trainer.loss_terms import KlReference
from mulligan.trainer.losses import ppo
from mulligan.trainer.objective import Tokens
from mulligan.trainer.objectives.divergence import Divergence
from mulligan.trainer.objectives.preference import Preference
from mulligan.trainer.objectives.transfer import Transfer
from mulligan.trainer.settings import LossSettings
from tests.support.learning import FULL, LORA, many, sampled, server_settings, spec

MODES = ("full", "lora")
LONG = tuple(range(2, 32)) * 2
# Of each step: more data than processes, with all terms; fewer data; several kinds, in which some data leave out what
# the learner then computes; several kinds whose losses run the model again for some of their data only.
BATCHES: list[tuple[list[Datum], LossSettings]] = [
    (many(9), ppo.Settings(kl_coefficient=0.1, entropy_coefficient=0.01)),
    ([sampled(tokens=LONG, trained=range(1, 60), rollout=[-3.0] * 59)], ppo.Settings(kl_reference=KlReference.MOVING)),
    ([*many(7, seed=1)], ppo.Settings(kl_coefficient=0.1, kl_reference=KlReference.MOVING)),
    ([*many(3, seed=2)], ppo.Settings(kl_coefficient=0.1)),
]


def preferences() -> list[Datum]:
    rejected = Tokens((2, 3, 9, 8), (False, False, True, True))
    given = Preference(rejected, 0.5, reference_log_probs=(-2.0, -3.0))
    data = [sampled(f"p{index}", LONG[: 6 + index], branch="preference") for index in range(3)]
    return [replace(datum, objective=given if index else Preference(rejected, 0.5)) for index, datum in enumerate(data)]


def demanding() -> list[Datum]:
    """The first of these alone asks for the reference, the last for another context."""
    transfers = [Transfer(1.0, ratio=float(index == 0)) for index in range(6)]
    teacher = Tokens((9, *LONG[6:14]), (False,) * 7 + (True,) * 2)
    return [
        replace(sampled(f"{index}", LONG[index:][:8], (6, 7), branch=type(objective).__name__), objective=objective)
        for index, objective in enumerate([*transfers, Divergence(teacher, 0.5)])
    ]


BATCHES[2][0].extend(preferences())
BATCHES[3][0].extend(demanding())


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Models are loaded in float64 and computed in it; transformers' norms compute in float32 otherwise."""
    load = model_module.load_source

    def in_double(*arguments: Any) -> Any:
        model, tokenizer = load(*arguments)
        return model.double(), tokenizer

    def norm(module: Any, hidden: Tensor) -> Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        found: Tensor = module.weight * hidden * torch.rsqrt(variance + module.variance_epsilon)
        return found

    with (
        patch.object(model_module, "load_source", in_double),
        patch.object(model_module, "_check_head"),
        patch("transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm.forward", norm),
    ):
        yield


def make(folder: Path, lora: bool, ranks: Ranks | None = None) -> Learner:
    settings = replace(spec(folder / "tiny", LORA if lora else FULL), keep_checkpoints=0, deterministic=True)
    # The adapter in two processes is trained with checkpointed activations, which must change nothing.
    server = server_settings(folder, microbatch_tokens=100, gradient_checkpointing=lora and ranks is not None)
    return Learner("learner", settings, server, ranks)


def learn(learner: Learner) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The gradients of each step and the weights at the end, by names, and all metrics."""
    found: dict[str, Tensor] = {}
    metrics: list[dict[str, float]] = []
    for step, (data, loss) in enumerate(BATCHES):
        metrics.append(learner.forward_backward(data, loss))
        for name, parameter in learner.model.trainable.items():
            assert parameter.grad is not None and parameter.dtype is torch.float64
            found[f"gradient {step} {name}"] = whole(parameter.grad).clone()
        metrics.append(learner.optim_step())
    found |= {f"weight {name}": value.clone() for name, value in learner.model.trained_weights()}
    data = BATCHES[0][0]
    found["log-probabilities"] = torch.tensor([value for row in learner.forward(data) for value in row])
    return found, metrics


def state(learner: Learner) -> dict[str, Tensor]:
    """All that a checkpoint restores, whole."""
    found = {f"weight {name}": value for name, value in learner.model.trained_weights()}
    found |= {f"reference {name}": whole(value) for name, value in learner.model.moving_reference.items()}
    for key, value in learner._optimizer.stored().items():
        name, slot = split(key)
        found[f"{slot} {name}"] = whole(value)
    return {name: value.detach().clone() for name, value in found.items()}


def by_torchrun(module: str, *arguments: object) -> None:
    """Runs the module in two processes. Raises AssertionError with what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module]
    command += map(str, arguments)
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def main(work: str, place: str) -> None:
    ranks = Ranks.join("cpu")
    with in_float64():
        for name in MODES:
            do(work, Path(place) / name, ranks, lora=name == "lora")
    ranks.leave()


def do(work: str, folder: Path, ranks: Ranks, *, lora: bool) -> None:
    metrics: list[dict[str, float]] = []
    found: dict[str, Tensor] = {}
    learner = make(folder, lora, ranks)
    if work == "learn":
        found, metrics = learn(learner)
        learner.save_checkpoint("of-two", 7)
        published = learner.publish_weights(1)
        metrics.append({f"probe {n} {m}": v for n, p in enumerate(published.canary) for m, v in enumerate(p.log_probs)})
    else:
        learner.load_checkpoint("of-one")
        learner.save_checkpoint("of-two-again", 7)
    found |= {f"state {name}": value for name, value in state(learner).items()}
    if ranks.is_first:
        save_file(found, folder / f"{work}.safetensors")
        (folder / f"{work}.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(*sys.argv[1:])
