"""What the services hold when a run has ended, as the judge needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mulligan.common.experience import Experience
from mulligan.common.inference import PolicyVersion
from mulligan.common.reflections import MemoryChange, RecordedUse, StoredReflection


@dataclass(frozen=True, slots=True)
class SavedLearner:
    """The learner's last checkpoint."""

    name: str
    next_sequence: int
    optimizer_steps: int


@dataclass(frozen=True, slots=True)
class ToldEvaluation:
    """What the run's events say of an evaluation, after so many steps. `environment` is empty for the run's own."""

    step: int
    success: float
    mean_reward: float
    attempts: int
    excluded: int
    environment: str = ""


@dataclass(frozen=True, slots=True)
class Final:
    """`completions` are the records of the journal that a step is complete, by step; `events` are the numbers of the
    run's events in their order, and of each the step whose metrics it has, or None. `entries` are all of the run's
    scope, also those that were forgotten, and `uses` those that were drawn of each, by its id. A reward reaches the
    success `threshold`, or does not. `readers_play`: whether first attempts read the memory."""

    run_id: str
    state: str
    error: str
    steps: int  # that are trained
    chains: int  # of a step
    experiences: Sequence[Experience] = ()
    completions: Mapping[int, int] = field(default_factory=dict)
    events: Sequence[tuple[int, int | None]] = ()
    entries: Sequence[StoredReflection] = ()
    uses: Mapping[str, Sequence[RecordedUse]] = field(default_factory=dict)
    changes: Sequence[MemoryChange] = ()
    versions: Sequence[PolicyVersion] = ()
    learner: SavedLearner | None = None
    evaluations: Sequence[ToldEvaluation] = ()
    threshold: float = 1.0
    readers_play: bool = False
