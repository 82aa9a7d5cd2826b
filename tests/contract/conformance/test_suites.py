"""The conformance suites: they pass on our servers, through the command, and notice each planted violation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from safetensors.torch import load_file

from mulligan.common.access import AccessRole
from mulligan.conformance.env.game import EnvOptions
from mulligan.conformance.env.run import check as check_env
from mulligan.conformance.env.run import target as env_target
from mulligan.conformance.policy import run as policy
from mulligan.conformance.policy.served import PolicyOptions
from mulligan.conformance.report import Report, Verdict
from mulligan.conformance.trainer import run as trainer
from mulligan.conformance.trainer.held import TrainerOptions
from mulligan.env.episodes import EpisodeTable
from mulligan.models import EMBEDDED
from mulligan.policy.v1 import policy_admin_service_pb2 as admin_pb
from mulligan.testing.loop import Loop
from mulligan.testing.processes import ServiceProcesses
from mulligan.testing.weights import full_weights
from tests.support import faulty_env, faulty_env_calls, faulty_env_steps
from tests.support.endpoint import MODELS, Asked, Reply, answer, delta, scripted, usage
from tests.support.faulty_proxy import Fault, between, faults
from tests.support.paths import IMPORT_ROOTS, ROOT
from tests.support.policy import serving
from tests.support.tokens import token_of, write_tokens

DICE = EnvOptions(actions=40, known=("1", "3", "5", "6"))


@pytest.fixture(scope="module")
def loop(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    return Loop.start(shared_services, tmp_path_factory.mktemp("loop"))


def command(*arguments: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, the JSON report, and what it wrote to stderr besides progress."""
    process = subprocess.run(
        [sys.executable, "-m", "mulligan.cli", "conformance", *arguments, "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": IMPORT_ROOTS, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    told = [line for line in process.stderr.splitlines(keepends=True) if not line.startswith("checking …")]
    return process.returncode, json.loads(process.stdout) if process.stdout else {}, "".join(told)


def titles(report: dict[str, Any], verdict: Verdict) -> set[str]:
    return {result["title"] for result in report["results"] if result["verdict"] == verdict}


@pytest.mark.parametrize(
    ("service", "flags", "absent"),
    [
        ("env", ["--environment", "frozenlake-3x3", "--actions", "50"], 6),
        ("memory", [], 3),
        ("policy", ["--writes"], 7),
        ("trainer", ["--writes"], 2),
    ],
)
def test_our_servers_conform(loop: Loop, service: str, flags: list[str], absent: int) -> None:
    """`absent` is how many checks may find nothing to look at: a token, features that the engine lacks, …."""
    status, report, errors = command(service, "--target", getattr(loop, service).address, *flags)
    assert (status, errors) == (0, ""), titles(report, Verdict.VIOLATED)
    assert report["conforms"] and report["counts"]["violated"] == 0
    assert len(titles(report, Verdict.NOT_APPLICABLE)) <= absent, titles(report, Verdict.NOT_APPLICABLE)


@pytest.mark.parametrize("service", ["env", "memory"])
def test_a_server_with_tokens_conforms_and_refuses_others(
    services: ServiceProcesses, tmp_path: Path, service: str
) -> None:
    settings: dict[str, Any] = {"database": tmp_path / "memory.sqlite"} if service == "memory" else {}
    address = services.start(service, tokens_folder=write_tokens(tmp_path), **settings).address
    known = {"MULLIGAN_CLI_TOKEN": token_of(AccessRole.ADMIN), "MULLIGAN_CLI_READER_TOKEN": token_of(AccessRole.READER)}
    for only in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        status, report, _ = command(service, "--target", address, "--only", only, **known)
        assert status == 0 and len(titles(report, Verdict.PASSED)) == 1
    status, _, errors = command(service, "--target", address, MULLIGAN_CLI_TOKEN="")
    assert status == 2 and "it wants a token" in errors and token_of(AccessRole.ADMIN) not in errors


async def test_a_policy_with_roles_conforms(tmp_path: Path) -> None:
    async with serving(tokens_folder=write_tokens(tmp_path)) as served:
        target = policy.target(
            served.address, token=token_of(AccessRole.ADMIN), reader_token=token_of(AccessRole.READER)
        )
        for only in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            report = await policy.check(target, PolicyOptions(), only=only)
            assert [result.verdict for result in report.results] == [Verdict.PASSED], report.problems()
        await target.close()
        target = policy.target(
            served.address, token=token_of(AccessRole.ADMIN), reader_token=token_of(AccessRole.ADMIN)
        )
        report = await policy.check(target, PolicyOptions(), only="PERMISSION_DENIED")
        assert [result.verdict for result in report.results] == [Verdict.VIOLATED], "this reader may do everything"
        await target.close()
        target = policy.target(served.address, token=token_of(AccessRole.TRAINER))
        report = await policy.check(target, PolicyOptions(), only="ListVersions")
        await target.close()
    assert {result.verdict for result in report.results} == {Verdict.NOT_APPLICABLE}, "it wants another token"


def completion(asked: Asked) -> Reply:
    """A model that says two words, or JSON where it is asked for, and stops where it is told to."""
    if asked.method == "GET":
        return MODELS
    text = '"yes"' if "response_format" in asked.body else "fine words"
    finish = "stop"
    for stop in asked.body.get("stop") or ():
        text = text[: text.index(stop) + len(stop)] if stop in text else text
    if asked.body.get("max_tokens", asked.body.get("max_completion_tokens", 9)) < 2:
        text = text[:4]
        finish = "length"
    if asked.body.get("stream"):
        return Reply(events=[delta(content=text), delta(finish), usage(3)])
    return answer(text, finish)


async def test_a_policy_without_token_ids_conforms() -> None:
    """An OpenAI-compatible endpoint offers little; what it lacks is refused by name, and no violation."""
    async with scripted(completion) as endpoint:
        settings = {"base_url": endpoint.address, "without": ("seed", "tools")}
        async with serving("m", backend="openai", openai=settings) as served:
            target = policy.target(served.address)
            report = await policy.check(target, PolicyOptions(writes=True))
            await target.close()
    assert report.conforms, report.problems()
    absent = [result for result in report.of(Verdict.NOT_APPLICABLE) if result.subject]
    assert len(absent) > 10 and all("does not offer FEATURE_" in result.why for result in absent)
    (unsupported,) = (result for result in report.results if "UNSUPPORTED_OPTION" in result.title)
    assert unsupported.verdict is Verdict.PASSED


def test_what_cannot_be_checked_ends_with_status_2(loop: Loop) -> None:
    status, _, errors = command("env", "--target", "127.0.0.1:1")
    assert status == 2 and "127.0.0.1:1: ListEnvironments failed with UNAVAILABLE" in errors
    status, _, errors = command("memory", "--target", loop.env.address)
    assert status == 2 and "it serves another service" in errors
    status, _, errors = command("env", "--target", loop.env.address, "--environment", "chess")
    assert status == 2 and "offers no environment 'chess'; there are: frozenlake" in errors


async def env_report(kind: type[faulty_env.Faulty], only: str = "", **how: bool) -> Report:
    async with faulty_env.served(kind, **how) as address:
        target = env_target(address, timeout=10.0)
        report = await check_env(target, DICE, only=only)
        await target.close()
    return report


async def test_a_server_without_a_fault_conforms_and_keeps_no_episode() -> None:
    tables: list[EpisodeTable] = []

    class Watched(faulty_env.NoFault):
        def __init__(self, table: EpisodeTable) -> None:
            super().__init__(table)
            tables.append(table)

    report = await env_report(Watched)
    assert report.conforms and len(report.of(Verdict.PASSED)) > 55, report.problems()
    assert [table.live_count for table in tables] == [0]


@pytest.mark.parametrize("kind", [*faulty_env_steps.KINDS, *faulty_env_calls.KINDS], ids=lambda kind: kind.__name__)
async def test_a_violation_of_the_env_contract_is_noticed(kind: type[faulty_env.Faulty]) -> None:
    report = await env_report(kind, kind.title)
    assert [result.title for result in report.violations] == [kind.title], report.results


async def test_fields_that_nobody_checks_are_noticed() -> None:
    report = await env_report(faulty_env.NoFault, "bad field", guarded=False)
    assert {result.call for result in report.violations} >= {"ListTasks", "StartEpisode", "StepEpisode", "EndEpisode"}
    report = await env_report(faulty_env.NoFault, "malformed batch", guarded=False)
    assert {result.call for result in report.violations} == {"StartEpisodes", "StepEpisodes"}


async def test_a_server_may_leave_starts_of_many_out() -> None:
    class LeavesOut(faulty_env.NoFault):
        async def StartEpisodes(self, request: Any, context: Any) -> Any:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")

    report = await env_report(LeavesOut, "StartEpisodes")
    assert len(report.results) > 4 and {result.verdict for result in report.results} == {Verdict.NOT_APPLICABLE}


async def test_an_unhealthy_server_is_noticed() -> None:
    report = await env_report(faulty_env.NoFault, "health service", healthy=False)
    assert [result.call for result in report.violations] == ["grpc.health.v1.Health"]


async def test_a_lease_that_ends_is_waited_for() -> None:
    class Brief(faulty_env.NoFault):
        lease_seconds = 0.2

    report = await env_report(Brief, "idle for longer than its lease")
    assert [result.verdict for result in report.results] == [Verdict.PASSED]


async def proxied(loop: Loop, fault: Fault) -> Report:
    async with between(getattr(loop, fault.service).address, fault) as address:
        if fault.service == "policy":
            target = policy.target(address)
            report = await policy.check(target, PolicyOptions(), only=fault.title)
        else:
            target = trainer.target(address)
            config = trainer.smallest("frozenlake-3x3", "embedded")
            report = await trainer.check(target, TrainerOptions(writes=True, config=config), only=fault.title)
        await target.close()
    return report


@pytest.mark.parametrize("makes", [True, False], ids=["conforms", "takes-anything"])
async def test_sparse_files_are_checked_where_a_version_is_kept(makes: bool, tmp_path: Path) -> None:
    """A server that checks no checksum takes every sparse file."""

    class TakesAnything(Fault):
        call = "" if makes else "UploadWeights"
        error = "CHECKSUM_MISMATCH"
        instead = admin_pb.UploadWeightsResponse(uri="upload:///x")

    title = "a sparse file makes a whole one of a version that is kept, or is refused"
    async with serving(weights_folder=tmp_path) as served:
        info = await served.client.info()
        weights = full_weights(tmp_path / "w", load_file(EMBEDDED / "model.safetensors"), 1, info.fingerprint)
        await served.client.update_weights(weights)
        async with between(served.address, TakesAnything()) as address:
            target = policy.target(address)
            report = await policy.check(target, PolicyOptions(writes=True), only=title)
            await target.close()
    assert [(result.title, result.verdict) for result in report.results] == [
        (title, Verdict.PASSED if makes else Verdict.VIOLATED)
    ]


# Those of the memory's contract are in test_memory_suite.py.
# One waits until a lease has ended.
OTHERS = [
    pytest.param(kind, marks=[pytest.mark.long] if kind.__name__ == "KeepsLearnersForEver" else [])
    for kind in faults()
    if kind.service != "memory"
]


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: f"{kind.service}-{kind.__name__}")
async def test_a_violation_of_another_contract_is_noticed(loop: Loop, kind: type[Fault]) -> None:
    report = await proxied(loop, kind())
    assert [result.title for result in report.violations] == [kind.title], report.results
