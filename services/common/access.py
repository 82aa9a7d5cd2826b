"""Who may make which call: the roles, and one table of all that a service of ours serves.

`server.py` enforces the table, `tokens.py` says which role a caller has. docs/security.md shows the table; `make proto`
writes it there. The judge of training runs has a table of its own, in `services/testing/judge/access.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final


class AccessRole(StrEnum):
    """What a credential is for. Each role may also do what those before it may."""

    READER = "reader"  # sees what there is, changes nothing
    ACTOR = "actor"  # plays episodes, samples, reads and writes memories
    TRAINER = "trainer"  # runs, learners, new weights of a policy
    ADMIN = "admin"  # which models are served; what cannot be undone

    def includes(self, other: AccessRole) -> bool:
        order = list(AccessRole)
        return order.index(self) >= order.index(other)


ROLE_URI = "urn:mulligan:role:"  # in a certificate's subjectAltName, before the role of its holder

ANYONE: Final = None  # also callers without a credential

# By the full name of a gRPC service: for each of its calls the least role that may make it.
ACCESS: Mapping[str, Mapping[str, AccessRole | None]] = {
    "mulligan.env.v1.EnvService": {
        "ListEnvironments": AccessRole.READER,
        "ListTasks": AccessRole.READER,
        "StartEpisode": AccessRole.ACTOR,
        "StartEpisodes": AccessRole.ACTOR,
        "StepEpisode": AccessRole.ACTOR,
        "StepEpisodes": AccessRole.ACTOR,
        "ForkEpisode": AccessRole.ACTOR,
        "EndEpisode": AccessRole.ACTOR,
    },
    "mulligan.memory.v1.MemoryService": {
        "AddReflection": AccessRole.ACTOR,
        "AddReflections": AccessRole.ACTOR,
        "QueryReflections": AccessRole.ACTOR,  # a trial's uses are written down
        "GetReflection": AccessRole.READER,
        "ListReflections": AccessRole.READER,
        "DeleteReflection": AccessRole.TRAINER,
        "GetSnapshot": AccessRole.READER,
        "ReviseReflection": AccessRole.TRAINER,
        "EraseReflection": AccessRole.ADMIN,
        "ReportOutcome": AccessRole.ACTOR,
        "ExplainReflection": AccessRole.READER,
        "ListChanges": AccessRole.READER,
    },
    "mulligan.policy.v1.PolicyService": {
        "Generate": AccessRole.ACTOR,
        "GenerateMany": AccessRole.ACTOR,
        "StreamGenerate": AccessRole.ACTOR,
        "Score": AccessRole.ACTOR,
        "Tokenize": AccessRole.ACTOR,
        "GetPolicy": AccessRole.READER,
        "ListPolicies": AccessRole.READER,
    },
    "mulligan.policy.v1.PolicyAdminService": {
        "LoadModel": AccessRole.ADMIN,
        "UnloadModel": AccessRole.ADMIN,
        "UploadWeights": AccessRole.TRAINER,
        "UpdateWeights": AccessRole.TRAINER,
        "ListVersions": AccessRole.READER,
        "Rollback": AccessRole.ADMIN,  # it withdraws the later versions for good
        "ReleaseMemory": AccessRole.TRAINER,
        "ResumeMemory": AccessRole.TRAINER,
    },
    "mulligan.trainer.v1.RunService": {
        "StartRun": AccessRole.TRAINER,
        "GetRun": AccessRole.READER,
        "ListRuns": AccessRole.READER,
        "WatchRun": AccessRole.READER,
        "StopRun": AccessRole.TRAINER,
        "ResumeRun": AccessRole.TRAINER,
        "Evaluate": AccessRole.TRAINER,
        "StreamEvaluate": AccessRole.TRAINER,
        "ListExperiences": AccessRole.READER,
    },
    "mulligan.trainer.v1.LearnerService": {
        "CreateLearner": AccessRole.TRAINER,
        "GetLearner": AccessRole.READER,
        "ListLearners": AccessRole.READER,
        "DeleteLearner": AccessRole.TRAINER,
        "Forward": AccessRole.TRAINER,
        "ForwardBackward": AccessRole.TRAINER,
        "OptimStep": AccessRole.TRAINER,
        "SaveCheckpoint": AccessRole.TRAINER,
        "LoadCheckpoint": AccessRole.TRAINER,
        "PublishWeights": AccessRole.TRAINER,
    },
    # Probes carry no credential. The contracts are public, but messages of reflection have no bound that strangers may
    # be given: one is as large as any other message, and a call has any number of them.
    "grpc.health.v1.Health": {"Check": ANYONE, "Watch": ANYONE, "List": AccessRole.READER},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": AccessRole.READER},
}


def role_of_names(names: Iterable[str]) -> AccessRole | None:
    """The role that a certificate with these subject alternative names gives, the greatest if there are several."""
    found = {name.removeprefix(ROLE_URI) for name in names if name.startswith(ROLE_URI)}
    return next((role for role in reversed(AccessRole) if role in found), None)


def needed_role(method: str) -> AccessRole | None:
    """Of a call as gRPC names it, "/package.Service/Call". ADMIN for one that is not in the table."""
    service, _, call = method.lstrip("/").partition("/")
    return ACCESS.get(service, {}).get(call, AccessRole.ADMIN)
