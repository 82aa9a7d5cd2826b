"""Which attempts and reflections can be trained on.

A sample that the learner would refuse is left out of training and counted. This also holds for samples from a journal,
so no such sample ends a run or keeps one from being resumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from mulligan.common.errors import DomainError, Reason
from mulligan.common.rewards import is_usable
from mulligan.common.types import Attempt, Experience, Outcome, Reflection, TokenSequence
from mulligan.trainer.data import Datum, Distillation, ModelLimits, PolicyGradient, Problem, datum_problem
from mulligan.trainer.settings import AlgorithmSettings

Part = TypeVar("Part", Attempt, Reflection)

# Problems of whole samples, beside those of single data (`Problem`).
CUT_REFLECTION = "cut_reflection"
REWRITTEN_HISTORY = "rewritten_history"
NO_PROMPT = "no_prompt"
_MEANINGS = {
    Problem.TOO_LONG: "it is longer than the model's context",
    Problem.TOO_SHORT: "it has fewer than two tokens",
    Problem.NOT_IN_VOCABULARY: "it has token ids that the model does not know",
    Problem.NOTHING_SAMPLED: "the policy reported no tokens that it sampled",
    Problem.MISALIGNED: "it does not have one log-probability for each sampled token",
    Problem.NOT_FINITE: "it holds a number that is not finite",
    CUT_REFLECTION: "the reflection was cut at its token limit; algorithm.train_cut_reflections = true trains on it",
    REWRITTEN_HISTORY: "the policy began to rewrite earlier turns in the middle of a second attempt, which has no "
    "distilled copy then",
    NO_PROMPT: "the policy did not report the tokens of the first attempt's prompt, under which a second attempt is "
    "distilled",
}


class NotDistilled(Exception):
    """A successful second attempt has no distilled target. `problem` is the reason, one of the names above."""

    def __init__(self, problem: str):
        super().__init__(problem)
        self.problem = problem


def with_usable_reward(attempt: Attempt) -> Attempt:
    """The attempt, without reward where it has no outcome, no turn, or a reward that is not a usable number."""
    if not attempt.outcome.has_reward:
        return replace(attempt, reward=None)
    if not attempt.turns:
        return replace(attempt, outcome=Outcome.ENV_ERROR, reward=None, error="no turn was played")
    if attempt.reward is None or not is_usable(attempt.reward):
        error = f"the rewards of the steps add up to {attempt.reward}, which is no usable number"
        return replace(attempt, outcome=Outcome.ENV_ERROR, reward=None, error=error)
    return attempt


def never_fits(part: Attempt | Reflection) -> bool:
    """Whether the first prompt was longer than the policy's context, so that nothing was sampled. Older journals hold
    such attempts as TRUNCATED."""
    too_long = part.error.startswith(f"{Reason.PROMPT_TOO_LONG}:")
    if isinstance(part, Reflection):
        return too_long
    return not part.turns and (too_long or part.outcome is Outcome.TRUNCATED)


def prompt_notices(first: Sequence[Attempt], later: Sequence[Attempt | Reflection] = ()) -> list[str]:
    """Notices about attempts and reflections whose first prompt never fits.

    Raises DomainError PROMPT_TOO_LONG when no first attempt fits.
    """
    if first and all(map(never_fits, first)):
        said = first[0].error.removeprefix(f"{Reason.PROMPT_TOO_LONG}: ")
        raise DomainError(Reason.PROMPT_TOO_LONG, f"no attempt could begin: {said}")
    for part in (*first, *later):
        if never_fits(part):
            what = "a reflection" if isinstance(part, Reflection) else "an attempt"
            return [f"excluded, counted as excluded_prompt_too_long: {what}, because {part.error}"]
    return []


def trainable(
    experiences: Sequence[Experience], limits: ModelLimits, settings: AlgorithmSettings
) -> tuple[list[Experience], Counter[str]]:
    """The experiences without token sequences that cannot be trained on, and the number of dropped samples by problem.

    Rewards stay, because the advantages of the group need them.
    """
    chains = [_with_usable_rewards(chain) for chain in experiences]
    dropped: Counter[str] = Counter(chain.not_distilled for chain in chains if chain.not_distilled)

    def kept(part: Part) -> Part:
        problem = _cut(part, settings) or _problem(part.sequences, part.temperature, limits)
        if problem:
            dropped[problem] += 1
        return replace(part, sequences=()) if problem else part

    def chain_kept(chain: Experience) -> Experience:
        if chain.first_attempt.reward is None:
            return chain
        second = chain.second_attempt
        reflection = chain.reflection
        target = chain.distilled
        if second is None or second.reward is None:  # then the reflection has no reward either
            return replace(chain, first_attempt=kept(chain.first_attempt))
        if target is not None and (
            problem := _problem(target.sequences, second.temperature, limits, is_distilled=True)
        ):
            dropped[problem] += 1
            target = None
        return replace(
            chain,
            first_attempt=kept(chain.first_attempt),
            reflection=reflection if reflection is None or reflection.policy else kept(reflection),
            second_attempt=kept(second),
            distilled=target,
        )

    return [chain_kept(chain) for chain in chains], dropped


def counted(dropped: Mapping[str, int]) -> dict[str, float]:
    """The metrics `dropped` and `dropped_PROBLEM` of a step."""
    return {"dropped": float(sum(dropped.values()))} | {
        f"dropped_{problem}": float(count) for problem, count in sorted(dropped.items())
    }


def drop_notices(metrics: Mapping[str, float]) -> list[str]:
    """A notice for each problem that `counted` counted."""
    return [
        f"left out of training, counted as dropped_{problem}: a sample, because {meaning}"
        for problem, meaning in _MEANINGS.items()
        if f"dropped_{problem}" in metrics
    ]


def _with_usable_rewards(chain: Experience) -> Experience:
    second = chain.second_attempt
    return replace(
        chain,
        first_attempt=with_usable_reward(chain.first_attempt),
        second_attempt=None if second is None else with_usable_reward(second),
    )


def _cut(part: Attempt | Reflection, settings: AlgorithmSettings) -> str | None:
    is_cut = isinstance(part, Reflection) and part.outcome is Outcome.TRUNCATED
    return CUT_REFLECTION if is_cut and not settings.train_cut_reflections else None


def _problem(
    sequences: Sequence[TokenSequence], temperature: float, limits: ModelLimits, *, is_distilled: bool = False
) -> Problem | None:
    """The first problem of a sample; None if it can be trained on."""
    for sequence in sequences:
        objective = Distillation(1.0) if is_distilled else PolicyGradient(0.0, tuple(sequence.log_probs))
        datum = Datum("", tuple(sequence.token_ids), tuple(sequence.loss_mask), 1.0, temperature, objective, "")
        if found := datum_problem(datum, limits):
            return found.problem
    return None if sequences else Problem.NOTHING_SAMPLED
