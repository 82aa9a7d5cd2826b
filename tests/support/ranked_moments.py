"""A learner with moments of 8 bits in two processes (`torchrun -m tests.support.ranked_moments WORK FOLDER`), and the
same work in one.

`learn` takes two optimizer steps and saves "of-two". `reshard` loads "of-one", saves it as "of-one-again", and takes
two more. The first process writes the weights into FOLDER.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.ranks import Ranks
from tests.support.learning import PLAIN, many, server_settings, spec


def make(folder: Path, ranks: Ranks | None = None) -> Learner:
    settings = spec(folder / "square", deterministic=True)
    optimizer = settings.optimizer.model_copy(update={"moments": "8bit"})
    return Learner("learner", replace(settings, optimizer=optimizer), server_settings(folder), ranks)


def learn(learner: Learner) -> dict[str, Tensor]:
    """The weights after two steps."""
    for step in range(2):
        learner.forward_backward(many(6, seed=step), PLAIN)
        learner.optim_step()
    return {name: value.clone() for name, value in learner.model.trained_weights()}


def main(work: str, place: str) -> None:
    folder = Path(place)
    ranks = Ranks.join("cpu")
    learner = make(folder, ranks)
    if work == "learn":
        found = learn(learner)
        learner.save_checkpoint("of-two")
    else:
        learner.load_checkpoint("of-one")
        learner.save_checkpoint("of-one-again")
        found = learn(learner)
    if ranks.is_first:
        save_file(found, folder / f"{work}.safetensors")
    ranks.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
