"""Algorithms of learning from experience, one module each.

A module exports

- `Settings`, a subclass of `AlgorithmSettings`: the table `[algorithm]` of a run; its property `without_effect` names
  common settings that mean nothing to the algorithm, so that a run which sets them says so;
- `async def play(member: Member[Settings]) -> None`, which plays one member of a group and reads like the paper: it
  calls helpers of `Member`, such as `attempt`, `reflect` and `under`;
- `def train(groups: Sequence[Group], settings: Settings) -> list[Datum]`, a pure function from the step's groups to
  weighted training data. Helpers are in `mulligan.trainer.batch` and `mulligan.trainer.advantages`.

Groups without a signal may be replaced (`rollout.replace_rounds`). A group has one if `train` gives data with a
gradient for it alone, where rewards that differ by rounding are equal; in a run without a learner, if it leaves
something in the memory. An algorithm whose data have a gradient although they teach nothing may export
`has_signal(group: Group, settings: Settings) -> bool`, a pure function that decides instead.

It may export `NEEDS`, a set of what a run must have: "fork" (an environment for `Member.fork`), "tokenize" (a policy
that reports token ids, with a chat template that only appends), "own_reflections" (no `policies.reflector`),
"token_ids" and "score" (features of the policy). A run that lacks it is refused before a learner is created and
anything sampled.

It may export `REMEMBERS`, whether `play` calls `Member.remember`. Runs that learn nothing are told of by that.

It may export `PLAYS`, a `Played`, by which `mulligan train --dry-run` estimates its work.

`algorithm.name` is the name of a module here, of an entry point of the group `mulligan.algorithms`, or of any
importable module.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Played:
    """What a member of a group plays and is trained on, at most."""

    episodes: int  # sampled
    texts: int = 0  # sampled: reflections
    copies: int = 0  # of episodes, in another context
    unsampled: int = 0  # episodes and copies whose old log-probabilities can only come from the learner


# For `AlgorithmSettings.without_effect`: of algorithms without advantages; without policy gradients; without these and
# preferences, which are what the reference is for.
ADVANTAGES = frozenset({"advantage", "advantage_settings", "normalize_by_std"})
POLICY_GRADIENT = frozenset(
    f"loss.{setting}"
    for setting in (
        "name",
        "kl_coefficient",
        "kl_estimator",
        "entropy_coefficient",
        "mismatch_correction",
        "mismatch_limit",
    )
) | {"recompute_log_probs"}
REFERENCE = frozenset({"loss.kl_reference", "loss.reference_every"})
AGGREGATION = frozenset({"aggregation", "aggregation_constant"})
CUT_TEXTS = frozenset({"train_cut_reflections"})  # of an algorithm that trains no reflections
READING = frozenset({"memory_entries"})  # of one whose reflectors, if any, read no memory
SUPERVISED = ADVANTAGES | POLICY_GRADIENT | REFERENCE  # of one that imitates, or learns from a teacher
