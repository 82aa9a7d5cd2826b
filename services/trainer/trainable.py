"""Which samples and targets can be trained on.

A sample that the learner would refuse is left out of training and counted. This also holds for samples from a journal,
so no such sample ends a run or keeps one from being resumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mulligan.common.errors import DomainError, Reason
from mulligan.common.experience import Experience, Sample, TokenSequence, TrainingTarget
from mulligan.common.rewards import is_usable
from mulligan.common.types import Outcome
from mulligan.trainer.data import Datum, Distillation, ModelLimits, PolicyGradient, Problem, datum_problem

# Problems of whole samples, beside those of single data (`Problem`).
CUT_REFLECTION = "cut_reflection"
CUT_VERDICT = "cut_verdict"
REWRITTEN_HISTORY = "rewritten_history"
NO_PROMPT = "no_prompt"
OTHER_POLICY = "other_policy"
_MEANINGS = {
    Problem.TOO_LONG: "it is longer than the model's context",
    Problem.TOO_SHORT: "it has fewer than two tokens",
    Problem.NOT_IN_VOCABULARY: "it has token ids that the model does not know",
    Problem.NOTHING_SAMPLED: "the policy reported no tokens that it sampled",
    Problem.MISALIGNED: "it does not have one log-probability for each sampled token",
    Problem.NOT_FINITE: "it holds a number that is not finite",
    CUT_REFLECTION: "the text was cut at its token limit; algorithm.train_cut_reflections = true trains on it",
    CUT_VERDICT: "the judge's verdict on it was cut at its token limit (rollout.reflection_max_tokens), so it has no "
    "score",
    REWRITTEN_HISTORY: "the policy began to rewrite earlier turns in the middle of an episode, whose tokens under "
    "another prompt cannot be known then",
    NO_PROMPT: "the policy did not report the tokens of the prompt under which the sample's tokens were to stand",
    OTHER_POLICY: "another policy wrote a part of it (policies.reflector), whose tokens the trained one does not know",
}


class NotDistilled(Exception):
    """A sample has no prompt under another context. `problem` is the reason, one of the names above."""

    def __init__(self, problem: str):
        super().__init__(problem)
        self.problem = problem


def with_usable_reward(episode: Sample) -> Sample:
    """The episode, without reward where it has no outcome, no turn, or a reward that is not a usable number."""
    if not episode.outcome.has_reward:
        return replace(episode, reward=None)
    if not episode.turns:
        return replace(episode, outcome=Outcome.ENV_ERROR, reward=None, error="no turn was played")
    if episode.reward is None or not is_usable(episode.reward):
        error = f"the rewards of the steps add up to {episode.reward}, which is no usable number"
        return replace(episode, outcome=Outcome.ENV_ERROR, reward=None, error=error)
    return episode


def never_fits(sample: Sample) -> bool:
    """Whether the first prompt was longer than the policy's context, so that nothing was sampled. Older journals hold
    such episodes as TRUNCATED."""
    too_long = sample.error.startswith(f"{Reason.PROMPT_TOO_LONG}:")
    if not sample.is_episode:
        return too_long
    return not sample.turns and (too_long or sample.outcome is Outcome.TRUNCATED)


def prompt_notices(first: Sequence[Sample], later: Sequence[Sample] = ()) -> list[str]:
    """Notices about samples whose first prompt never fits. `first` are those that experiences begin with.

    Raises DomainError PROMPT_TOO_LONG when none of `first` fits.
    """
    if first and all(map(never_fits, first)):
        said = first[0].error.removeprefix(f"{Reason.PROMPT_TOO_LONG}: ")
        raise DomainError(Reason.PROMPT_TOO_LONG, f"no attempt could begin: {said}")
    for sample in (*first, *later):
        if never_fits(sample):
            what = "an attempt" if sample.is_episode else f"a {sample.role}"
            return [f"excluded, counted as excluded_prompt_too_long: {what}, because {sample.error}"]
    return []


def trainable(
    experiences: Sequence[Experience], limits: ModelLimits, *, train_cut_texts: bool = False
) -> tuple[list[Experience], Counter[str]]:
    """The experiences without token sequences that cannot be trained on, and the number of dropped samples by problem.

    Only samples with a reward count as dropped: the others are never trained on. Rewards stay, because the advantages
    of the group need them. Texts that were cut at their token limit are dropped unless `train_cut_texts`.
    """
    dropped: Counter[str] = Counter()

    def kept(sample: Sample) -> Sample:
        if sample.reward is None or sample.policy:
            return sample
        cut = not sample.is_episode and sample.outcome is Outcome.TRUNCATED and not train_cut_texts
        problem = CUT_REFLECTION if cut else _problem(sample.sequences, sample.temperature, limits)
        if problem:
            dropped[problem] += 1
        return replace(sample, sequences=()) if problem else sample

    def is_kept(target: TrainingTarget, source: Sample) -> bool:
        problem = _problem(target.sequences, source.temperature, limits, is_distilled=True)
        if problem:
            dropped[problem] += 1
        return problem is None

    def experience_kept(experience: Experience) -> Experience:
        samples = tuple(map(_with_usable_reward, experience.samples))
        experience = replace(experience, samples=samples)
        dropped.update(experience.untrained)
        targets = tuple(target for target in experience.targets if is_kept(target, experience.source(target)))
        return replace(experience, samples=tuple(map(kept, samples)), targets=targets)

    return [experience_kept(experience) for experience in experiences], dropped


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


def skip_notices(metrics: Mapping[str, float]) -> list[str]:
    """A notice if optimizer steps of a step were skipped as not finite."""
    if not metrics.get("not_finite"):
        return []
    return [
        "an optimizer step was skipped, counted as not_finite: its gradient or loss is not a finite number, so it "
        "is left out. After optimizer.max_skipped_steps of them in a row the run fails. A lower learning rate may help"
    ]


def _with_usable_reward(sample: Sample) -> Sample:
    return with_usable_reward(sample) if sample.is_episode else sample


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
