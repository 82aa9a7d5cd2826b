"""When a run saves a checkpoint."""

from __future__ import annotations

_SHARE = 0.05  # of the time that is protected, which saving may take
_FOR_RESUMING = 2  # checkpoints that a run keeps to go on from


class CheckpointTimes:
    """After which steps a run saves: every `every` steps, and sooner where saving is cheap beside what it protects.

    A kill costs what was computed since the last checkpoint. Samples are no part of that: the journal has them. So a
    checkpoint is due when saving took the last time at most a twentieth of what would be lost; and after the first step
    of a run that goes on, as it is not known yet how long saving takes. Where `keep` is more than what resuming needs,
    somebody wants those of every `every` steps: others would push them out.
    """

    def __init__(self, every: int, keep: int):
        self._every = every
        self._early = keep <= _FOR_RESUMING
        self._owed = False
        self._unsaved = 0.0  # seconds
        self._saving: float | None = None  # seconds of the last one

    def stepped(self, step: int, seconds: float) -> None:
        """`step` steps are trained. What came after sampling took so many seconds in the last one."""
        self._owed |= step % self._every == 0
        self._unsaved += seconds

    @property
    def is_due(self) -> bool:
        is_cheap = self._saving is None or self._saving <= _SHARE * self._unsaved
        return self._owed or (self._early and self._unsaved > 0 and is_cheap)

    def saved(self, seconds: float) -> None:
        """Saving took so long."""
        self._owed = False
        self._unsaved = 0.0
        self._saving = seconds
