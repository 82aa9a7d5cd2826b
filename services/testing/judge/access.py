"""Authorisation: who has not the right credential is refused, whatever else fails; who has it is not.

The rule has a table of its own, written by hand from docs/security.md: the one in `mulligan.common.access` is among
what it judges. `tests/unit/testing/judge/test_access.py` says where they differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mulligan.testing.judge.history import BrokenRule, RecordedCall

RULE = "access"
ROLES = ("reader", "actor", "trainer", "admin")  # each may also do what those before it may
ANYBODY = ""
# By service: the calls that need at least this role.
_LEAST: Mapping[str, Mapping[str, str]] = {
    "EnvService": {
        "reader": "ListEnvironments ListTasks",
        "actor": "StartEpisode StartEpisodes StepEpisode StepEpisodes ForkEpisode EndEpisode",
    },
    "MemoryService": {
        "reader": "GetReflection ListReflections GetSnapshot ExplainReflection ListChanges",
        "actor": "AddReflection AddReflections QueryReflections ReportOutcome",
        "trainer": "DeleteReflection ReviseReflection",
        "admin": "EraseReflection",
    },
    "PolicyService": {
        "reader": "GetPolicy ListPolicies",
        "actor": "Generate GenerateMany StreamGenerate Score Tokenize",
    },
    "PolicyAdminService": {
        "reader": "ListVersions",
        "trainer": "UploadWeights UpdateWeights ReleaseMemory ResumeMemory",
        "admin": "LoadModel UnloadModel Rollback",
    },
    "RunService": {
        "reader": "GetRun ListRuns WatchRun ListExperiences",
        "trainer": "StartRun StopRun ResumeRun Evaluate StreamEvaluate",
    },
    "LearnerService": {
        "reader": "GetLearner ListLearners",
        "trainer": (
            "CreateLearner DeleteLearner Forward ForwardBackward OptimStep SaveCheckpoint LoadCheckpoint PublishWeights"
        ),
    },
    "Health": {ANYBODY: "Check Watch", "reader": "List"},
    "ServerReflection": {"reader": "ServerReflectionInfo"},
}
_NEEDED = {
    (service, call): role
    for service, roles in _LEAST.items()
    for role, calls in roles.items()
    for call in calls.split()
}
NO_TOKEN = "none"  # what a stranger may have instead of a role's token
UNKNOWN_TOKEN = "unknown"
NO_RUN = "trainer, no run"  # the role of a trainer, for what needs the credential of a run besides
OTHER_RUN = "trainer, another run"
_OUTSIDE = (NO_RUN, OTHER_RUN)
# Why such a call may be refused: an entry is looked for before its scope is known.
_KEPT_OUT = ("RUN_CREDENTIAL", "UNKNOWN_REFLECTION", "CALLER_LIMIT")
_REFUSED = ("UNAUTHENTICATED", "PERMISSION_DENIED")


def check(calls: Sequence[RecordedCall]) -> Iterator[BrokenRule]:
    for call in calls:
        if not call.credential:
            if call.code in _REFUSED:
                yield BrokenRule(RULE, "the right credential was refused", (call,))
        elif call.credential in _OUTSIDE:
            if call.answer is not None:
                yield BrokenRule(RULE, f"what is the run's was given to a caller with {call.credential!r}", (call,))
            elif call.refused and call.reason not in _KEPT_OUT:
                yield BrokenRule(RULE, f"the call of a caller with {call.credential!r} was looked at", (call,))
        elif not may(call.credential, call.method):
            if call.answer is not None:
                yield BrokenRule(RULE, f"a call was answered to a caller with {call.credential!r}", (call,))
            elif call.refused and call.code not in _REFUSED:
                yield BrokenRule(RULE, f"the call of a caller with {call.credential!r} was looked at", (call,))
        elif call.code in _REFUSED:
            yield BrokenRule(RULE, f"the role {call.credential!r} was refused", (call,))


def least_role(method: str) -> str | None:
    """Of a call as gRPC names it, /package.Service/Call: the least role that may make it, or ANYBODY; None for a call
    that docs/security.md does not have."""
    _, service, call = method.split("/")
    return _NEEDED.get((service.rpartition(".")[2], call))


def may(credential: str, method: str) -> bool:
    """Whether who has a token of this role, or none or an unknown one, may make the call."""
    needed = least_role(method)
    if needed == ANYBODY:
        return True
    if credential not in ROLES or needed is None:
        return credential == ROLES[-1]
    return ROLES.index(credential) >= ROLES.index(needed)
