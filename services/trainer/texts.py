"""The texts that agents and reflectors are given, filled in from an environment's prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mulligan.common.experience import Sample
from mulligan.common.thoughts import without_thoughts
from mulligan.common.types import PromptSet


def fill(template: str, **values: str) -> str:
    """Replaces each `{name}` in one pass, so that braces inside a value stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def trace_of(attempt: Sample, prompts: PromptSet) -> str:
    """An episode as text for the reflection: every observation and action, then the last observation."""
    turns = (fill(prompts.trace_turn, observation=turn.observation, action=turn.action) for turn in attempt.turns)
    return "".join(turns) + attempt.final_observation


def episode_text(attempt: Sample, prompts: PromptSet) -> str:
    """An episode word for word as the memory keeps it: what happened, then the feedback, if there was any."""
    return "\n".join(filter(None, (trace_of(attempt, prompts), attempt.feedback)))


def reflection_request(episode: Sample, prompts: PromptSet, texts: Sequence[str]) -> str:
    """The user message to a reflector: what happened in the episode, and `texts` from the memory."""
    return fill(
        prompts.reflection,
        trace=trace_of(episode, prompts),
        feedback=episode.feedback,
        reward=f"{episode.reward:g}",
        memory="\n\n".join(texts) or prompts.memory_empty,
    )


def guided_by(text: str, prompts: PromptSet) -> str:
    """The system prompt of an attempt that is given a reflection: its text, then the reminder of the action format."""
    return f"{text}\n{prompts.action_reminder}"


def first_system(texts: Sequence[str], prompts: PromptSet) -> str:
    """The system prompt of a first attempt that reads `texts` from the memory; without any, the deployed one."""
    return guided_by("\n\n".join(texts), prompts) if texts else prompts.solver


def has_marks(prompts: PromptSet) -> bool:
    """Whether the environment has marks for reflections: one in another language may leave them out."""
    return bool(prompts.reflection_open and prompts.reflection_close)


def reflection_in(answer: str, prompts: PromptSet) -> str:
    """The text between the last pair of marks, or the whole answer without a pair. Thoughts are removed before."""
    said = without_thoughts(answer)
    if not has_marks(prompts):
        return said.strip()
    _, opened, tail = said.rpartition(prompts.reflection_open)
    text, closed, _ = tail.partition(prompts.reflection_close)
    return (text if opened and closed else said).strip()
