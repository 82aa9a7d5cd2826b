"""What the embedded model learns besides FrozenLake: Sokoban in the smallest rooms, and HotpotQA's small set.

A run is one of `mulligan demo`. What follows from the results is in docs/methods.md.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM

from mulligan.common.experience import Sample
from mulligan.env.base import Split, StepResult, TaskInfo
from mulligan.env.envs import DEFAULT_ENVIRONMENTS
from mulligan.env.envs.hotpotqa import world
from mulligan.env.envs.hotpotqa.environment import SEARCH, HotpotQa, Settings, create
from mulligan.env.envs.hotpotqa.score import Method
from mulligan.env.grid import INVALID
from mulligan.env.load import load_or_explain
from mulligan.models import EMBEDDED
from mulligan.models.build import ASSISTANT, END, SYSTEM, USER
from mulligan.models.recipe.sampling import Conversations, Sampling, attempt_all
from mulligan.trainer.events import EventLog
from mulligan.trainer.journal import journal_file, journaled_steps, read_experiences
from proof.methods import Arm, train

RUNS = {
    "sokoban-erl": Arm("sokoban-small"),
    "sokoban-rlvr": Arm("sokoban-small-rlvr"),
    "sokoban-erl-short": Arm("sokoban-small", ("steps=40",)),
}
LEGENDS = {
    "no_legend": "",
    "box_is_goal_wall_is_hole": "A player\nB goal\nE hole\nD floor\n",
    "goal_is_goal_wall_is_hole": "A player\nC goal\nE hole\nD floor\n",
    "box_is_goal_goal_is_hole": "A player\nB goal\nC hole\nD floor\n",
}
_NO_ACTION = (Method.NO_ANSWER, "unreadable tool call")
ANSWER_TOKENS = 64  # the longest answer of the set, in a box, has fewer


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
        "valid_actions": [round(valid_share(samples), 4) for samples in steps],
        "train_success": [round(metrics[step].metrics.get("success_first", 0.0), 4) for step in sorted(metrics)],
        "groups_with_signal": [
            round(metrics[step].metrics.get("groups_with_signal", 0.0), 4) for step in sorted(metrics)
        ],
    }


def _first_attempts(journal: Path) -> list[Sample]:
    samples = (sample for experience in read_experiences(journal) for sample in experience.samples)
    return [sample for sample in samples if sample.role == "first"]


def valid_share(samples: Iterable[Sample]) -> float:
    """The share of turns in which the environment read a move."""
    turns = [turn for sample in samples for turn in sample.turns]
    return fmean(not turn.is_invalid for turn in turns) if turns else 0.0


def sokoban_legends(_: Path, each: int = 4) -> dict[str, Any]:
    """Success on the test rooms of the untrained model, `each` times: without a legend, and with the four lines that it
    can read. None of them names a box or a wall."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model = Qwen3ForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32, use_safetensors=True)
    environment = load_or_explain("sokoban-small", DEFAULT_ENVIRONMENTS["sokoban-small"])
    count = environment.info.task_counts[Split.TEST]
    ids = [task.task_id for task in environment.list_tasks(Split.TEST, 0, count) for _ in range(each)]
    measured = {}
    for name, text in LEGENDS.items():
        tasks = [(environment.start(task_id), text + environment.info.prompts.solver) for task_id in ids]
        attempts = attempt_all(model, tokenizer, environment.info, tasks, Sampling())
        invalid = sum(attempt.trace.split("\n").count(INVALID) for attempt in attempts)
        measured[name] = {
            "success": fmean(attempt.reward for attempt in attempts),
            "valid_actions": round(1 - invalid / sum(attempt.steps for attempt in attempts), 4),
        }
    return {"attempts_each": len(ids), **measured}


def hotpotqa_answers(_: Path, each: int = 4) -> dict[str, Any]:
    """The model's answers to the test questions, `each` times at temperature 1. A turn without a search is the last."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model = Qwen3ForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32, use_safetensors=True)
    environment = create("hotpotqa", Settings())
    solver = environment.info.prompts.solver
    results: list[StepResult] = []
    for seed in range(each):
        episodes = [environment.start(task.task_id) for task in _tests(environment)]
        chat = Conversations(model, tokenizer, len(episodes), seed)
        chat.tell([f"{SYSTEM}{solver}{END}{USER}{episode.observation}{END}{ASSISTANT}" for episode in episodes])
        answers = chat.answers(Sampling(), ANSWER_TOKENS)
        results += [episode.step(answer) for episode, answer in zip(episodes, answers, strict=True)]
    readings = Counter(result.action.partition(":")[0].partition("(")[0] for result in results)
    return {
        "attempts": len(results),
        "readings": dict(readings),
        "valid_actions": fmean(not result.action.startswith(_NO_ACTION) for result in results),
        "exact_matches": sum(result.reward == 1 for result in results),
        "with_reward": sum(result.reward > 0 for result in results),
    }


def hotpotqa_context(_: Path) -> dict[str, Any]:
    """Tokens of the test questions' conversations, up to the result of a first search for the question's own words. And
    what the commonest answer would earn without any search."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    context: int = AutoConfig.from_pretrained(EMBEDDED).max_position_embeddings
    environment = create("hotpotqa", Settings())
    training, test = world.data_sets()
    commonest = Counter(question["answer"] for question in training).most_common(1)[0][0]
    texts = [_searched(environment, task.task_id) for task in _tests(environment)]
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


def _tests(environment: HotpotQa) -> Sequence[TaskInfo]:
    return environment.list_tasks(Split.TEST, 0, environment.info.task_counts[Split.TEST])


def _searched(environment: HotpotQa, task_id: str) -> tuple[str, str]:
    """A conversation up to the question, and what a search for it adds."""
    episode = environment.start(task_id)
    question = episode.observation
    call = f"<tool_call>{json.dumps({'name': SEARCH.name, 'arguments': {'query': question}})}</tool_call>"
    return environment.info.prompts.solver + question, call + episode.step(call).observation


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{f"embedded/{name}": partial(learn, arm) for name, arm in RUNS.items()},
    "embedded/sokoban-legends": sokoban_legends,
    "embedded/hotpotqa-answers": hotpotqa_answers,
    "embedded/hotpotqa-context": hotpotqa_context,
}
