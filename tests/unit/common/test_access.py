"""The table of roles: it has every call that is served, and no other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from mulligan.common.access import ACCESS, AccessRole, needed_role
from mulligan.common.server import RequestInterceptor, add_standard_services
from mulligan.env.episodes import EpisodeLimits
from mulligan.env.servicer import add_to_server as add_env
from mulligan.memory.servicer import add_to_server as add_memory
from mulligan.policy.servicer import add_to_server as add_policy
from mulligan.trainer.learner.servicer import add_to_server as add_learner
from mulligan.trainer.servicer import add_to_server as add_runs
from tests.support.paths import ROOT

Table = Mapping[str, Mapping[str, AccessRole | None]]


class Recorder:
    """Stands for a server: it records which calls are added to it."""

    def __init__(self) -> None:
        self.calls: set[tuple[str, str]] = set()

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self.calls |= {(service, call) for call in handlers}

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """As the health service and reflection do, which add what they have in this way, too."""
        for handler in handlers:
            for method in getattr(handler, "_method_handlers", {}):
                _, service, call = method.split("/")
                self.calls.add((service, call))


def served() -> set[tuple[str, str]]:
    """By the four services, as their programs add them."""
    recorder: Any = Recorder()
    nothing: Any = MagicMock()
    table: Any = SimpleNamespace(limits=EpisodeLimits())
    names = [*add_env(recorder, table), *add_memory(recorder, nothing, nothing), *add_policy(recorder, nothing)]
    names += [*add_runs(recorder, nothing), *add_learner(recorder, nothing)]
    add_standard_services(recorder, names)
    return set(recorder.calls)


def declared() -> Iterator[tuple[str, str]]:
    """By the contracts."""
    for path in (ROOT / "services").glob("*/v1/*_pb2.py"):
        module = import_module(f"mulligan.{path.parts[-3]}.v1.{path.stem}")
        for service in module.DESCRIPTOR.services_by_name.values():
            yield from ((service.full_name, method.name) for method in service.methods)


def differences(table: Table, calls: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Calls that are not in the table, and rows that name no call."""
    return {(service, call) for service, of in table.items() for call in of} ^ calls


def test_every_call_that_is_served_is_in_the_table_and_every_row_is_a_call() -> None:
    calls = served()
    assert set(declared()) <= calls, "the services serve what the contracts declare"
    assert len(calls) > len(set(declared())), "and health and reflection"
    assert differences(ACCESS, calls) == set()


@pytest.mark.parametrize(
    ("planted", "noticed"),
    [
        ({**ACCESS, "mulligan.env.v1.EnvService": {}}, ("mulligan.env.v1.EnvService", "StepEpisode")),
        ({**ACCESS, "mulligan.env.v1.Gone": {"Call": AccessRole.ADMIN}}, ("mulligan.env.v1.Gone", "Call")),
        ({key: of for key, of in ACCESS.items() if "health" not in key}, ("grpc.health.v1.Health", "Check")),
    ],
    ids=["a call that is missing", "a row of no call", "a service that is missing"],
)
def test_a_table_with_a_fault_is_noticed(planted: Table, noticed: tuple[str, str]) -> None:
    assert noticed in differences(planted, served())


def test_a_call_that_is_not_in_the_table_needs_the_greatest_role() -> None:
    assert needed_role("/mulligan.env.v1.EnvService/StepEpisode") is AccessRole.ACTOR
    assert needed_role("/mulligan.env.v1.EnvService/Planted") is AccessRole.ADMIN
    assert needed_role("/planted.Service/Call") is needed_role("nothing") is AccessRole.ADMIN
    assert needed_role("/grpc.health.v1.Health/Check") is None


def test_the_calls_that_need_no_credential_have_limits_of_their_own() -> None:
    """A server has none for others: each call that anybody may make is one that strangers can exhaust."""
    anybody = {f"/{service}/{call}" for service, of in ACCESS.items() for call, role in of.items() if role is None}
    assert anybody == RequestInterceptor().open_calls


def test_a_role_includes_those_before_it() -> None:
    assert [role for role in AccessRole if role.includes(AccessRole.ACTOR)] == [
        AccessRole.ACTOR,
        AccessRole.TRAINER,
        AccessRole.ADMIN,
    ]
    assert all(role.includes(AccessRole.READER) and AccessRole.ADMIN.includes(role) for role in AccessRole)
