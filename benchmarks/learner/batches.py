"""The data that the benchmark trains on: a step of ERL out of a journal, and sequences that share nothing.

`erl-demo.binpb` is a ForwardBackwardRequest with what step 40 of `mulligan demo` trained on: ERL on 3×3 FrozenLake;
`erl-demo-lm.binpb` one with step 1 of `make demo-lm`: ERL of SmolLM2-135M on short sentences.
`python -m benchmarks.learner.batches RUN_FOLDER STEP FILE` writes such a file.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from mulligan.trainer.batch import groups_of
from mulligan.trainer.data import Datum, Distillation, ModelLimits, PolicyGradient
from mulligan.trainer.journal import journal_file, read_experiences
from mulligan.trainer.learner.wire import data_from_proto, data_to_proto
from mulligan.trainer.settings import ALGORITHMS, RunSettings
from mulligan.trainer.trainable import trainable
from mulligan.trainer.v1 import learner_service_pb2 as pb

ERL_DEMO = Path(__file__).parent / "erl-demo.binpb"
ERL_DEMO_LM = Path(__file__).parent / "erl-demo-lm.binpb"
ERL_DEMO_MINIBATCHES = 8  # over so many optimizer steps the demo deals it out
# tokens of a turn; sampled tokens among them
TURN = 12
SAMPLED = 3


def recorded(path: Path) -> list[Datum]:
    return data_from_proto(pb.ForwardBackwardRequest.FromString(path.read_bytes()).data)


def ragged(count: int, vocabulary: int) -> list[Datum]:
    """Like episodes: a prompt, then turns with a few sampled (trained) tokens and the environment's."""
    rng = random.Random(0)
    data: list[Datum] = []
    for index in range(count):
        prompt = rng.randint(50, 90)
        turns = rng.randint(4, 8)
        size = prompt + turns * TURN
        mask = tuple(place >= prompt and (place - prompt) % TURN < SAMPLED for place in range(size))
        rollout = tuple(-rng.uniform(4, 7) for _ in range(turns * SAMPLED))
        objective = Distillation(1.0) if index % 4 == 0 else PolicyGradient(rng.choice([-1.0, 1.0]), rollout)
        branch = "distilled" if index % 4 == 0 else "first"
        tokens = tuple(rng.randrange(vocabulary) for _ in range(size))
        data.append(Datum(str(index), tokens, mask, 1 / count, 1.0, objective, branch))
    return data


def record(run: Path, step: int, path: Path) -> None:
    """Writes the data of a step that can move the weights."""
    settings = RunSettings.model_validate(json.loads((run / "run.json").read_text())["settings"])
    kept, _ = trainable(read_experiences(journal_file(run / "journal", step)), ModelLimits(0, 0))
    data = ALGORITHMS.find(settings.algorithm.name).train(groups_of(kept), settings.algorithm)
    moving = [datum for datum in data if datum.weight and datum.objective.moves(settings.loss)]
    path.write_bytes(pb.ForwardBackwardRequest(data=data_to_proto(moving)).SerializeToString(deterministic=True))


if __name__ == "__main__":
    record(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
