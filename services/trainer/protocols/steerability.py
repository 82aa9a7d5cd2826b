"""How far contexts steer the policy, as in STEER-BENCH (arXiv 2505.20645): the same questions are played in several
contexts, such as none, the name of a community, examples of its answers, examples on other topics.

`accuracy_CONTEXT` of each context, and `gain_CONTEXT`: that less the accuracy of `baseline`. The tag `context` of a
task says in which context it shows its question, the tag `question` which question it is. Only questions that are
there in all contexts count. Sampling is as published: temperature 0.75, top-p 0.9.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from pydantic import Field

from mulligan.common.types import EnvironmentInfo, TaskInfo
from mulligan.trainer.player import Player
from mulligan.trainer.protocols import MOST_SAMPLES, ProtocolSettings


class Settings(ProtocolSettings):
    name: str = "steerability"
    baseline: str = "none"
    samples: int = Field(1, ge=1, le=MOST_SAMPLES)
    temperature: float = Field(0.75, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)


def lacks(environment: EnvironmentInfo, tasks: Sequence[TaskInfo], settings: Settings) -> str:
    contexts = _contexts(tasks)
    if len(contexts) < 2:
        return "its test tasks have no tags 'context' and 'question'; expected the same questions in several contexts"
    if settings.baseline not in contexts:
        return f"no test task is in the context {settings.baseline!r} (baseline); there are: {', '.join(contexts)}"
    if not _complete(tasks):
        return f"no question is there in all contexts ({', '.join(contexts)})"
    return ""


async def run(player: Player, tasks: Sequence[TaskInfo], settings: Settings) -> dict[str, float]:
    asked = [(context, task) for question in _complete(tasks) for context, task in question.items()]
    samples = await player.attempts(
        [task for _, task in asked],
        settings.samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=0,
    )
    solved = defaultdict(list)
    for number, sample in enumerate(samples):
        if sample.reward is not None:
            solved[asked[number // settings.samples][0]].append(player.solves(sample))
    accuracy = {context: fmean(solved[context]) for context in _contexts(tasks) if solved[context]}
    metrics = {f"accuracy_{context}": share for context, share in accuracy.items()}
    if settings.baseline in accuracy:
        gains = {context: share - accuracy[settings.baseline] for context, share in accuracy.items()}
        metrics |= {f"gain_{context}": gain for context, gain in gains.items() if context != settings.baseline}
    return metrics


def _contexts(tasks: Sequence[TaskInfo]) -> list[str]:
    found = (task.tags["context"] for task in tasks if task.tags.get("context") and task.tags.get("question"))
    return list(dict.fromkeys(found))


def _complete(tasks: Sequence[TaskInfo]) -> list[Mapping[str, TaskInfo]]:
    """The questions that are there in all contexts: of each its tasks by context."""
    questions: dict[str, dict[str, TaskInfo]] = defaultdict(dict)
    for task in tasks:
        if task.tags.get("context") and task.tags.get("question"):
            questions[task.tags["question"]][task.tags["context"]] = task
    count = len(_contexts(tasks))
    return [by_context for by_context in questions.values() if len(by_context) == count]
