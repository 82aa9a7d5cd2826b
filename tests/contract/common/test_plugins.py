"""A backend, an environment, a store and an embedder of a package outside of the tree: served by the name of an entry
point and by module path, with settings of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Message, Role, SamplingParams
from mulligan.common.reflections import Provenance, ReflectionQuery, RetrievalStrategy
from mulligan.conformance.env.game import EnvOptions
from mulligan.conformance.env.run import check as check_env
from mulligan.conformance.env.run import target as env_target
from mulligan.conformance.memory import run as memory
from mulligan.conformance.policy import run as policy
from mulligan.conformance.policy.served import PolicyOptions
from mulligan.env import EnvClient, Split
from mulligan.memory import MemoryClient
from mulligan.policy import PolicyClient
from mulligan.testing.processes import ProcessFailed, ServiceProcesses
from tests.support.distribution import install

Client = TypeVar("Client", EnvClient, MemoryClient, PolicyClient)
PROMPT = (Message(Role.USER, "Pretty Polly"),)


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a process that has the package."""
    folder = install(tmp_path_factory.mktemp("installed"))
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}


@asynccontextmanager
async def closing(client: Client) -> AsyncIterator[Client]:
    try:
        yield client
    finally:
        await client.close()


async def said(address: str) -> str:
    async with closing(PolicyClient(Endpoint(address))) as client:
        return (await client.generate(PROMPT, SamplingParams(max_tokens=9))).text


@pytest.mark.parametrize(
    ("kind", "untrusted"),
    [
        ("countdown", False),
        ("acme.countdown", True),
        pytest.param("countdown", True, marks=pytest.mark.long),
        pytest.param("acme.countdown", False, marks=pytest.mark.long),
    ],
)
async def test_an_environment(services: ServiceProcesses, acme: dict[str, str], kind: str, untrusted: bool) -> None:
    tables = {"count": {"kind": kind, "first": 3, "untrusted": untrusted}}
    address = services.start("env", environment=acme, environments=tables).address
    async with closing(EnvClient(Endpoint(address))) as client:
        [task, *_] = await client.list_tasks("count", Split.TRAIN, 3)
        episode = await client.start("count", task.task_id, "episode")
        assert episode.observation == "2" and (await episode.step("1")).reward == 1.0
    target = env_target(address)
    report = await check_env(target, EnvOptions(actions=20, known=("1", "2", "3")))
    await target.close()
    assert report.conforms, report.problems()


@pytest.mark.parametrize(
    "settings",
    [
        {"backend": "parrot", "parrot.greeting": "Ahoy! ", "parrot.loudness": 2},
        {"backend": "acme.parrot", "backend-settings": {"greeting": "Ahoy! ", "loudness": 2}},
    ],
    ids=["entry point", "module"],
)
async def test_a_backend(services: ServiceProcesses, acme: dict[str, str], settings: dict[str, Any]) -> None:
    address = services.start("policy", environment=acme, **settings).address
    assert await said(address) == "Ahoy! Pretty Polly Pretty Polly"
    target = policy.target(address)
    report = await policy.check(target, PolicyOptions())
    await target.close()
    assert report.conforms, report.problems()


@pytest.mark.parametrize(
    "settings",
    [
        {"database": "notes:desk", "notes.pages": 1},
        {"database": "acme.notes:desk", "store-settings": {"pages": 1}},
    ],
    ids=["entry point", "module"],
)
async def test_a_store(services: ServiceProcesses, acme: dict[str, str], settings: dict[str, Any]) -> None:
    roomy = services.start("memory", environment=acme, database=settings["database"]).address
    target = memory.target(roomy)
    report = await memory.check(target)
    await target.close()
    assert report.conforms, report.problems()
    small = services.start("memory", environment=acme, **settings).address
    async with closing(MemoryClient(Endpoint(small))) as client:
        assert await client.snapshot("scope") == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"embedder": "letters", "letters.alphabet": "xyz"},
        {"embedder": "acme.letters", "embedder-settings": {"alphabet": "xyz"}},
    ],
    ids=["entry point", "module"],
)
async def test_an_embedder(services: ServiceProcesses, acme: dict[str, str], settings: dict[str, Any]) -> None:
    address = services.start("memory", environment=acme, database="notes:desk", **settings).address
    origin = Provenance("run", "experience", "lake", "task", 0, 0.0, 1.0, True)
    async with closing(MemoryClient(Endpoint(address))) as client:
        for text in ("xxy", "zz", "abc"):
            await client.add(text, "scope", text, origin)
        query = ReflectionQuery("scope", "lake", RetrievalStrategy.SIMILAR_MEANING, 2)
        found = await client.query(replace(query, text="y, and x"))
        assert [one.text for one in found.reflections] == ["xxy", "zz"]
        assert not (await client.query(replace(query, text="abc"))).reflections, "nothing to embed"


def test_settings_come_from_files_and_variables_too(
    services: ServiceProcesses, acme: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('backend = "parrot"\n[parrot]\ngreeting = "Ahoy! "\nloudness = 3\n')
    variables = acme | {"MULLIGAN_POLICY_PARROT__LOUDNESS": "0"}
    with pytest.raises(ProcessFailed, match=r"parrot\.loudness: Input should be greater than or equal to 1"):
        services.start("policy", environment=variables, config=file)


@pytest.mark.parametrize(
    ("service", "settings", "said"),
    [
        (
            "policy",
            {"backend": "parot"},
            "backend: there is no backend 'parot'; did you mean 'parrot'?; there are",
        ),
        (
            "policy",
            {"backend": "broken"},
            "backend: 'broken' is no backend: No module named 'acme.nowhere'",
        ),
        ("policy", {"backend": "acme.countdown"}, "'acme.countdown' is no backend: it has no `open`"),
        ("policy", {"backend": "acme.notes"}, "'acme.notes' is no backend: its `Settings` is no BackendSettings"),
        (
            "policy",
            {"backend": "acme.parrot", "backend-settings": {"greting": ""}},
            "backend_settings: greting: no such setting; did you mean 'greeting'?",
        ),
        (
            "policy",
            {"backend-settings": {"greeting": ""}},
            "backend_settings: the settings of transformers have",
        ),
        (
            "memory",
            {"database": "note:desk"},
            "database: there is no store 'note'; did you mean 'notes'?",
        ),
        (
            "memory",
            {"database": "acme.notes:desk", "store-settings": {"pages": 0}},
            "store_settings.pages: Input should be greater than or equal to 1",
        ),
        ("memory", {"database": "notes:floor"}, "database: notes lie on the desk, not at 'floor'"),
        (
            "memory",
            {"database": "notes:desk", "embedder": "leters"},
            "embedder: there is no embedder 'leters'; did you mean 'letters'?",
        ),
        ("memory", {"embedder": "acme.notes"}, "embedder: 'acme.notes' is no embedder: it has no `create`"),
        ("memory", {"embedder": "given"}, "given.size: Field required"),
        (
            "memory",
            {"embedder": "acme.letters", "embedder-settings": {"alphabet": ""}},
            "embedder_settings.alphabet: String should have at least 1 character",
        ),
        ("memory", {"embedder-settings": {"alphabet": "a"}}, "embedder_settings: no embedder is set"),
        ("memory", {"embedder": "sentence_transformers", "sentence-transformers.model": "m"}, "needs the extra"),
        (
            "env",
            {"environments": {"e": {"kind": "countdwn"}}},
            "environments.e.kind: there is no environment 'countdwn'; did you mean 'countdown'?; there are ",
        ),
        (
            "env",
            {"environments": {"e": {"kind": "countdown", "frist": 3}}},
            "frist: no such setting; did you mean",
        ),
        (
            "env",
            {"environments": {"e": {"kind": "countdown", "first": 1}}},
            "environments.e: Value error, first must",
        ),
    ],
)
def test_what_is_wrong_is_named(
    services: ServiceProcesses, acme: dict[str, str], service: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ProcessFailed) as caught:
        services.start(service, environment=acme, **settings)
    assert said in str(caught.value)


async def test_load_model_takes_no_modules(services: ServiceProcesses, acme: dict[str, str]) -> None:
    """A module runs code: only the server's settings name one."""
    settings: dict[str, Any] = {"backend": "acme.parrot", "backend-settings": {"greeting": "Hello! "}}
    address = services.start("policy", environment=acme, **settings).address
    async with closing(PolicyClient(Endpoint(address))) as client:
        options = {"parrot.greeting": "Ahoy! "}
        await client.load_model("second", "embedded", backend="parrot", options=options)
        await client.load_model("actor", "another", backend="parrot", options=options)
        assert {(await client.info(name)).backend for name in ("actor", "second")} == {"parrot"}
        assert await said(address) == "Ahoy! Pretty Polly", "the module's settings are not the other backend's"
        await client.load_model("actor", "another", options={"backend_settings.loudness": 2})
        assert await said(address) == "Hello! Pretty Polly Pretty Polly"
        for backend, problem in (("acme.countdown", "there is no backend"), ("broken", "'broken' is no backend")):
            with pytest.raises(DomainError, match=problem) as caught:
                await client.load_model("third", "embedded", backend=backend)
            assert caught.value.reason is Reason.INVALID_SETTING


def test_the_command_knows_an_installed_environment(acme: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mulligan.cli", "env", "check", "countdown", "--actions", "20"]
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | acme, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
