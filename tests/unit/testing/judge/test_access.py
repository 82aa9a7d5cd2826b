"""The judge's own table of who may make which call."""

from __future__ import annotations

import pytest

from mulligan.common.access import ACCESS, AccessRole
from mulligan.testing.judge.access import ANYBODY, NO_TOKEN, ROLES, UNKNOWN_TOKEN, least_role, may
from mulligan.testing.judge.strangers import SERVICES

CALLS = [f"/{service}/{call}" for service, found in SERVICES.items() for call in found.methods_by_name]


@pytest.mark.parametrize("method", CALLS)
def test_it_has_each_call_of_the_contracts(method: str) -> None:
    assert least_role(method) in ROLES


def test_the_services_have_the_same() -> None:
    """Who means to change a role changes both tables."""
    served = {
        f"/{service}/{call}": role or ANYBODY for service, calls in ACCESS.items() for call, role in calls.items()
    }
    assert served == {method: least_role(method) for method in served}
    assert served.keys() >= set(CALLS)


def test_a_greater_role_may_what_a_lesser_one_may() -> None:
    assert list(ROLES) == list(AccessRole)
    add = "/mulligan.memory.v1.MemoryService/AddReflection"
    assert [role for role in (NO_TOKEN, UNKNOWN_TOKEN, *ROLES) if may(role, add)] == ["actor", "trainer", "admin"]
    assert may(NO_TOKEN, "/grpc.health.v1.Health/Check") and not may(NO_TOKEN, "/grpc.health.v1.Health/List")


def test_a_call_that_the_table_lacks_is_for_administrators() -> None:
    assert [role for role in (NO_TOKEN, *ROLES) if may(role, "/mulligan.memory.v1.MemoryService/DropAll")] == ["admin"]
