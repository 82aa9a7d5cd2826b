"""Why a run failed, in words: for those who may start runs, and for those who only look on."""

from __future__ import annotations

from mulligan.common.errors import CallFailed, DomainError, ServiceUnavailable, fault
from mulligan.trainer.evaluation import EvaluationFailed
from mulligan.trainer.harness import NotRepeatable
from mulligan.trainer.pipeline import TooStale
from mulligan.trainer.run_environment import EnvironmentChanged
from mulligan.trainer.sampling import ForeignWeights, VersionLost

# Their messages are put together here, of what those who look on may know.
_FOR_ALL = (
    DomainError,
    CallFailed,
    ServiceUnavailable,
    EnvironmentChanged,
    EvaluationFailed,
    ForeignWeights,
    NotRepeatable,
    TooStale,
    VersionLost,
)


def words_of(error: BaseException) -> str:
    """What the exception says. That of other code, such as a plug-in, may quote anything that the process knows."""
    return str(error) if isinstance(error, DomainError) else f"{type(error).__name__}: {error}"


def told_of(error: BaseException) -> str:
    """What those who only look on are told in place of `words_of`: the incident by which it is found in the log; empty
    where they are told the same."""
    return "" if isinstance(error, _FOR_ALL) else fault(error)
