"""The images that hold no torch, built and run on a real engine as compose.yaml runs them in production.

The other two take minutes to build; `proof/docker.py` runs all four, and a training run across them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from uuid import uuid4

import pytest
from docker.client import DockerClient

from mulligan.common.channel import Endpoint, is_healthy
from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import Provenance
from mulligan.common.types import Outcome, Split
from mulligan.env.client import EnvClient
from mulligan.memory.client import MemoryClient
from mulligan.testing.compose import Project, image, missing, project
from tests.support.found import require_docker
from tests.support.paths import ROOT

SERVICES = ("env", "memory")
FILES = ("compose.yaml", "compose.env.yaml")  # the second gives env a port
BASE = os.environ.get("BASE", "python:3.11-slim")
MAX_BYTES_OVER_BASE = 250 * 10**6
MODULES = ("torch", "transformers", "numpy", "pip", "setuptools", "ensurepip._bundled", "pytest")
PROGRAMS = ("pip", "pip3", "gcc", "cc", "make", "git", "curl", "mulligan")
FIND = """
import importlib.util, sys
for name in sys.argv[1:]:
    try:
        print(name, importlib.util.find_spec(name) is not None)
    except ImportError:
        print(name, False)
"""
UNTRUSTED = """
from mulligan.env.base import Split
from mulligan.env.config import EnvSettings
settings = EnvSettings(environments={"lake": {"kind": "frozenlake", "untrusted": True}})
lake = settings.create_environments()["lake"]
(task,) = lake.list_tasks(Split.TEST, 0, 1)
print(lake.start(task.task_id).step("```Down```").observation)
"""
SPREAD = """
import asyncio
from pathlib import Path
from mulligan.common.channel import Endpoint
from mulligan.common.tls import ClientTls
from mulligan.common.types import Split
from mulligan.env.replicas import connect

async def main():
    tls = ClientTls(Path("/run/tls/ca.crt"))
    env = connect(Endpoint("dns:///env:50051", token_file=Path("/run/env-tokens/actor"), tls=tls))
    (task,) = await env.list_tasks("frozenlake", Split.TEST, 1)
    episodes = [await env.start("frozenlake", task.task_id, f"spread-{number}") for number in range(64)]
    steps = await asyncio.gather(*(episode.step("```Down```") for episode in episodes))
    print(len(steps), len({step.observation for step in steps}))
    await env.close()

asyncio.run(main())
"""

REACH = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()
    print("reached")
except OSError:
    print("not reached")
"""

pytestmark = pytest.mark.timeout(600)  # the first build downloads packages


@pytest.fixture(scope="module")
def running() -> Iterator[Project]:
    require_docker(missing())
    with project(f"mulligan-test-{uuid4().hex[:8]}", services=SERVICES, files=FILES, folder=ROOT / "docker") as started:
        yield started


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_an_episode_is_played_across_the_wall(running: Project) -> None:
    client = EnvClient(running.endpoint("env"))
    names = {info.name: info.unavailable for info in await client.list_environments()}
    installed = {name for name, problem in names.items() if not problem}
    assert {"frozenlake", "frozenlake-3x3", "sokoban", "hotpotqa"} <= installed
    (task,) = await client.list_tasks("frozenlake", Split.TEST, 1)
    episode = await client.start("frozenlake", task.task_id, "an-episode")
    assert episode.observation
    for _ in range(8):
        step = await episode.step("```Down```")
        if step.done:
            break
    assert step.done and step.outcome in (Outcome.COMPLETED, Outcome.TRUNCATED) and step.reward is not None
    await client.close()


async def test_a_stranger_is_refused(running: Project, service: str) -> None:
    """Without TLS there is no answer; with TLS, none to a caller without a token, but to a probe."""
    address, tls = running.address(service), running.trust(service)
    assert await is_healthy(address, 20.0, tls) and not await is_healthy(address, 1.0)
    endpoint = Endpoint(address, tls=tls, outage_seconds=0)
    client = EnvClient(endpoint) if service == "env" else MemoryClient(endpoint)
    with pytest.raises(DomainError) as caught:
        await (client.list_environments() if isinstance(client, EnvClient) else client.list("scope"))
    assert caught.value.reason is Reason.BAD_CREDENTIAL
    await client.close()


def test_each_has_its_own_key_and_nobody_has_the_authoritys(running: Project) -> None:
    listed = {name: running.execute(name, "find", "/run", "-type", "f").stdout.split() for name in SERVICES}
    tls = {f"/run/tls/{name}" for name in ("ca.crt", "tls.crt", "tls.key")}
    wanted = {name: tls | ({"/run/tls/run-keys.pem"} if name in ("memory", "trainer") else set()) for name in SERVICES}
    tokens = {name: {file for file in files if "tokens" in file} for name, files in listed.items()}
    assert {name: set(files) - tokens[name] for name, files in listed.items()} == wanted
    assert all(file.startswith("/run/env-tokens/") for file in tokens["env"])
    keys = [running.execute(name, "cat", "/run/tls/tls.key").stdout for name in SERVICES]
    assert all("PRIVATE KEY" in key for key in keys) and len(set(keys)) == 2
    again = running.run("run", "--rm", "certs")
    assert "nothing to make" in again.stdout, again.stderr


def test_from_its_own_network_env_reaches_nobody(running: Project) -> None:
    """Not even this machine, which other containers reach."""
    client = DockerClient.from_env()
    name = running.variables["COMPOSE_PROJECT_NAME"]
    here = client.networks.get(f"{name}_default").attrs["IPAM"]["Config"][0]["Gateway"]
    with socket.create_server((here, 0)) as listening:
        command = ["-c", REACH, here, str(listening.getsockname()[1])]
        answers = {
            network: client.containers.run(
                "mulligan/env:test", command, entrypoint="python", network=f"{name}_{network}", remove=True
            )
            for network in ("default", "env")
        }
    client.close()
    assert answers == {"default": b"reached\n", "env": b"not reached\n"}


def test_untrusted_environments_have_processes_of_their_own_in_there_too(running: Project) -> None:
    played = running.execute("env", "python", "-c", UNTRUSTED)
    assert played.returncode == 0 and played.stdout.strip(), played.stderr


def test_episodes_spread_over_the_replicas_that_a_name_stands_for(running: Project) -> None:
    with running.another("env") as second:
        spread = running.execute("env", "python", "-c", SPREAD)
        assert spread.stdout.split()[-2:] == ["64", "1"], spread.stderr  # all served, on one board
        assert 0 < second.logs().decode().count("method=StartEpisode") < 64


async def test_a_new_container_has_what_the_old_one_kept(running: Project) -> None:
    client = MemoryClient(running.endpoint("memory"))
    origin = Provenance("run", "experience", "frozenlake", "train/00001", 3, 0.0, 1.0, True)
    before = [await client.add("first", "scope", "A is the player", origin)]
    running.run("restart", "memory")
    before.append(await client.add("second", "scope", "B is the goal", origin))
    running.run("kill", "memory")
    running.run("rm", "--force", "memory")
    running.run("up", "--detach", "--wait", "--no-build", "memory")
    stored = await client.list("scope")
    assert [entry.reflection_id for entry in stored] == before
    assert await client.add("second", "scope", "B is the goal", origin) == before[1]
    await client.close()


def test_it_runs_without_privileges(running: Project, service: str) -> None:
    state = running.inspect(service)
    assert state["State"]["Health"]["Status"] == "healthy"
    assert state["HostConfig"]["ReadonlyRootfs"] and not state["HostConfig"]["Privileged"]
    status = running.execute(service, "cat", "/proc/self/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == ["10001"] * 4 and fields["Gid"].split() == ["10001"] * 4
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0 and fields["NoNewPrivs"] == "1"
    for path in ("/app/x", "/opt/mulligan/x", "/etc/x", "/x"):
        assert running.execute(service, "touch", path).returncode != 0, path
    assert running.execute(service, "touch", "/tmp/x").returncode == 0
    for host in state["NetworkSettings"]["Ports"].values():
        assert {binding["HostIp"] for binding in host or []} == {"127.0.0.1"}


def test_nothing_is_in_it_that_it_does_not_run(running: Project, service: str) -> None:
    found = running.execute(service, "python", "-c", FIND, "mulligan.common", *MODULES)
    needed = {"memory": ["numpy"]}.get(service, [])  # for evidence and search
    assert found.stdout.split() == [
        *("mulligan.common", "True"),
        *(word for name in MODULES for word in (name, str(name in needed))),
    ]
    for program in PROGRAMS:
        assert running.execute(service, "sh", "-c", f"command -v {program}").returncode != 0, program
    others = {"env": "memory", "memory": "env"}[service]
    assert running.execute(service, "ls", f"/app/mulligan/{others}", "/app/mulligan/trainer").returncode != 0
    # Nor packages on the shelf, as ensurepip has them.
    assert running.execute(service, "sh", "-c", "find / -xdev -name '*.whl' 2>/dev/null | grep .").returncode != 0


def test_what_the_image_says_of_itself(running: Project, service: str) -> None:
    about = image(service)
    config = about["Config"]
    assert config["User"] == "10001:10001"
    assert config["Healthcheck"]["Test"][:4] == ["CMD", "python", "-m", "mulligan.common.healthcheck"]
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items()}
    assert labels["title"] == f"mulligan-{service}" and {"description", "version", "revision"} <= set(labels)
    assert not [variable for variable in config["Env"] if "TOKEN" in variable or "SECRET" in variable]
    over = about["Size"] - image(BASE)["Size"]
    print(f"{service}: {about['Size'] / 1e6:.0f} MB, {over / 1e6:.0f} MB over the base")
    assert 0 < over <= MAX_BYTES_OVER_BASE


def test_the_health_check_notices_a_service_that_does_not_serve(running: Project, service: str) -> None:
    check = ("python", "-m", "mulligan.common.healthcheck")
    (port,) = [port.partition("/")[0] for port in image(service)["Config"]["ExposedPorts"]]
    assert running.execute(service, *check, f"127.0.0.1:{port}").returncode == 0
    stuck = running.execute(service, *check, "127.0.0.1:1", "--timeout", "1")
    assert stuck.returncode == 1 and "does not serve" in stuck.stderr


def test_sigterm_ends_it_cleanly(running: Project) -> None:
    """Last, as the others need the services."""
    running.run("stop", *SERVICES)
    assert [running.inspect(service)["State"]["ExitCode"] for service in SERVICES] == [0, 0]
