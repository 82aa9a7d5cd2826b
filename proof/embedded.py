"""What the embedded model learns besides FrozenLake: Sokoban in the smallest rooms, and HotpotQA's small set.

Each run is one of `mulligan demo`. What follows from the results is in docs/methods.md.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from mulligan.common.experience import Sample, Turn
from mulligan.env.base import Split
from mulligan.env.envs.hotpotqa import world
from mulligan.env.envs.hotpotqa.environment import SEARCH, HotpotQa, Settings, create
from mulligan.env.envs.hotpotqa.score import Method
from mulligan.models import EMBEDDED
from mulligan.trainer.events import EventLog
from mulligan.trainer.journal import journal_file, journaled_steps, read_experiences
from proof.methods import Arm, train

# An answer in a box has up to 20 tokens, a search about 100.
_HOTPOTQA = ("environment=hotpotqa", "steps=10", "rollout.max_tokens=128", "evaluation.every=0")
RUNS = {
    "sokoban-erl": Arm("sokoban-small"),
    "sokoban-rlvr": Arm("sokoban-small-rlvr"),
    "hotpotqa-erl": Arm("frozenlake-3x3", _HOTPOTQA),
    "hotpotqa-rlvr": Arm("frozenlake-3x3-rlvr", _HOTPOTQA),
}
_NO_ACTION = (Method.NO_ANSWER, "unreadable tool call")


def learn(arm: Arm, folder: Path) -> dict[str, Any]:
    """One run in `folder`, which goes on where it was interrupted."""
    run = train(arm, [], folder)
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    summary.pop("run_id")
    return {"recipe": arm.recipe, **summary, **_of_journal(run)}


def _of_journal(run: Path) -> dict[str, Any]:
    """What first attempts did, and whether their groups told them apart. Lists have a number for each step."""
    steps = [_first_attempts(journal_file(run / "journal", step)) for step in journaled_steps(run / "journal")]
    metrics = EventLog(run / "events.jsonl").steps()
    return {
        "first_attempts": sum(map(len, steps)),
        "first_attempts_with_reward": sum((sample.reward or 0) > 0 for samples in steps for sample in samples),
        "valid_actions": [round(_valid_share(samples), 4) for samples in steps],
        "train_success": [round(metrics[step].metrics.get("success_first", 0.0), 4) for step in sorted(metrics)],
        "groups_with_signal": [
            round(metrics[step].metrics.get("groups_with_signal", 0.0), 4) for step in sorted(metrics)
        ],
    }


def _first_attempts(journal: Path) -> list[Sample]:
    samples = (sample for experience in read_experiences(journal) for sample in experience.samples)
    return [sample for sample in samples if sample.role == "first"]


def _valid_share(samples: Iterable[Sample]) -> float:
    """The share of turns in which the environment read an action: a move, a search or an answer."""
    turns = [turn for sample in samples for turn in sample.turns]
    return fmean(_is_valid(turn) for turn in turns) if turns else 0.0


def _is_valid(turn: Turn) -> bool:
    return not turn.is_invalid and not turn.action.startswith(_NO_ACTION)


def hotpotqa_context(_: Path) -> dict[str, Any]:
    """Tokens of the test questions' conversations, up to the result of a first search for the question's own words. And
    what the commonest answer would earn without any search."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    context: int = AutoConfig.from_pretrained(EMBEDDED).max_position_embeddings
    environment = create("hotpotqa", Settings())
    train, test = world.data_sets()
    ((commonest, _),) = Counter(question["answer"] for question in train).most_common(1)
    texts = [_searched(environment, f"{Split.TEST}/{question['_id']}") for question in test]
    asked = [len(tokenizer.encode(before)) for before, _ in texts]
    searched = [len(tokenizer.encode(before + after)) for before, after in texts]
    return {
        "context": context,
        "questions": len(test),
        "tokens_asked": {"mean": round(fmean(asked)), "most": max(asked)},
        "tokens_after_a_search": {"mean": round(fmean(searched)), "most": max(searched)},
        "fit_after_a_search": fmean(tokens < context for tokens in searched),
        "commonest_training_answer": commonest,
        "its_share_of_test_answers": fmean(question["answer"] == commonest for question in test),
    }


def _searched(environment: HotpotQa, task_id: str) -> tuple[str, str]:
    """A conversation up to the question, and what a search for it adds."""
    episode = environment.start(task_id)
    question = episode.observation
    call = f"<tool_call>{json.dumps({'name': SEARCH.name, 'arguments': {'query': question}})}</tool_call>"
    return environment.info.prompts.solver + question, call + episode.step(call).observation


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{f"embedded/{name}": partial(learn, arm) for name, arm in RUNS.items()},
    "embedded/hotpotqa-context": hotpotqa_context,
}
