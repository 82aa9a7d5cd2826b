"""Notices about settings that mean nothing to the algorithm of a run, and about runs that learn nothing.

They are not refused: a run may only play, to compare or to collect, and such settings always were accepted.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from pydantic import BaseModel

from mulligan.trainer.loss_settings import LossSettings
from mulligan.trainer.losses import LOSSES
from mulligan.trainer.memory_settings import MemoryWrites
from mulligan.trainer.settings import ALGORITHMS, RunSettings

_PATIENCE = 3  # steps without anything to learn before a notice
_OFF = (0, "none")  # who asks for a term of the loss to be left out is right where there is none
_OF_READERS = ("memory_entries",)  # settings that first attempts read by, too


def is_given(chosen: BaseModel, setting: str) -> bool:
    """Whether somebody gave the setting. A value that is not the default was given."""
    default = type(chosen).model_fields[setting].get_default(call_default_factory=True)
    return bool(getattr(chosen, setting) != default)


def notices_of_idle_runs(settings: RunSettings) -> Iterator[str]:
    """What keeps the run from learning, as far as its settings say."""
    algorithm = settings.algorithm
    writes_nothing = _writes_nothing(settings)
    has_own_scope = (algorithm.memory_scope or "run") == "run"
    if writes_nothing and has_own_scope and algorithm.memory_entries:
        yield (
            "algorithm.memory_entries: nothing is read from the run's own scope of the memory unless somebody else "
            f"fills it, because {writes_nothing}; algorithm.memory_scope names another scope"
        )
    if settings.trains:
        if settings.optimizer.learning_rate == 0:
            yield "optimizer.learning_rate: nothing is learned with 0"
    elif writes_nothing and (has_own_scope or not algorithm.memory_entries):
        yield f'learner: nothing is learned: with "none" the memory alone learns, and {writes_nothing}'


def notices_of_ignored(settings: RunSettings) -> Iterator[str]:
    """What somebody gave and the algorithm has no use for."""
    algorithm, loss = settings.algorithm, settings.loss
    ignored = set(algorithm.without_effect)
    if remembers(ALGORITHMS.find(algorithm.name)) is False:
        ignored.add("memory_writes")
    if "loss.name" in ignored:
        ignored |= {f"loss.{own}" for own in type(loss).model_fields.keys() - LossSettings.model_fields.keys()}
    for entry in sorted(ignored):
        if _is_given_in_vain(settings, entry):
            named = entry if "." in entry else f"algorithm.{entry}"
            yield f'{named}: it has no effect with algorithm.name = "{algorithm.name}"'
    if not algorithm.recompute_log_probs:
        for entry in sorted({"loss.mismatch_correction", "loss.mismatch_limit"} - ignored):
            if _is_given_in_vain(settings, entry):
                yield f"{entry}: it has no effect with algorithm.recompute_log_probs = false"


def _is_given_in_vain(settings: RunSettings, entry: str) -> bool:
    """`entry` is one that has no effect."""
    table, _, setting = entry.rpartition(".")
    if not table:
        chosen = settings.algorithm
        is_read = entry in _OF_READERS and chosen.memory_readers.play
        return setting in type(chosen).model_fields and is_given(chosen, setting) and not is_read
    if setting == "name":
        return settings.loss.name != LOSSES.default
    return is_given(settings.loss, setting) and getattr(settings.loss, setting) not in _OFF


def _writes_nothing(settings: RunSettings) -> str:
    """Why the run writes nothing into the memory; empty if it may."""
    algorithm = settings.algorithm
    if algorithm.memory_episodes:
        return ""
    if remembers(ALGORITHMS.find(algorithm.name)) is False:
        return f'algorithm "{algorithm.name}" writes nothing into it'
    return 'algorithm.memory_writes is "none"' if algorithm.memory_writes is MemoryWrites.NONE else ""


def remembers(algorithm: ModuleType) -> bool | None:
    """Whether the algorithm puts texts into the memory; None where it does not say."""
    found: bool | None = getattr(algorithm, "REMEMBERS", None)
    return found


class FirstSteps:
    """The first steps of a run, or of its part since it was resumed: whether one of them teaches something. A single
    step may not, where all attempts solve their tasks."""

    def __init__(self, settings: RunSettings):
        self._settings = settings
        self._silent = 0
        self._has_learned = False

    def notice(self, step: int, *, has_learned: bool) -> str:
        """What to tell after this step; empty unless none of the first few steps, or of all, taught anything."""
        self._has_learned |= has_learned
        self._silent += 1
        is_last = step + 1 == self._settings.steps
        if self._has_learned or not (is_last or self._silent == _PATIENCE):
            return ""
        steps = f"step {step}" if self._silent == 1 else f"steps {step + 1 - self._silent} to {step}"
        return self._nothing_moved(steps) if self._settings.trains else self._nothing_left(steps)

    def _nothing_moved(self, steps: str) -> str:
        beside = " but that of the KL divergence or entropy" if self._settings.loss.regularizes else ""
        alone = self._settings.rollout.rollouts_per_task == 1
        why = "; a group of one (rollout.rollouts_per_task = 1) is compared with nothing" if alone else ""
        return f"nothing to train on: no datum of {steps} has a gradient{beside}{why}"

    @staticmethod
    def _nothing_left(steps: str) -> str:
        return f"nothing learned: {steps} left nothing in the memory, and the run has no learner"
