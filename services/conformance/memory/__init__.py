"""Checks of `proto/mulligan/memory/v1/memory_service.proto`.

Each check writes to a scope of its own and deletes what it wrote. What the first version of the contract lacks (labels,
further strategies, revisions, erasing, uses, the log) is not applicable at a server that leaves it out."""

from __future__ import annotations

from mulligan.conformance import common
from mulligan.conformance.memory import additions, entries, erasing, labels, log, queries, revisions, strategies, uses
from mulligan.conformance.report import Suite
from mulligan.conformance.target import CheckSession
from mulligan.memory.v1 import memory_service_pb2 as pb

FIRST = ("GetSnapshot", pb.GetSnapshotRequest(scope="conformance"))
MEMORY: Suite[CheckSession] = Suite()
MEMORY.extend(part.suite for part in (entries, additions, queries, labels, strategies, revisions, erasing, uses, log))
common.add_credential(MEMORY, *FIRST)
common.add_roles(MEMORY, "DeleteReflection", pb.DeleteReflectionRequest(reflection_id="no-such-reflection"))
common.add_health(MEMORY)
common.add_reflection(MEMORY, "mulligan.memory.v1.MemoryService")
