"""The memory service and its PostgreSQL on a real engine, as compose.postgres.yaml runs them. The image of PostgreSQL,
`pgvector/pgvector` unless POSTGRES_IMAGE names another, must be on the engine already."""

from __future__ import annotations

import os
from collections.abc import Iterator
from uuid import uuid4

import pytest
from docker.errors import ImageNotFound

from mulligan.common.reflections import Provenance
from mulligan.memory.client import MemoryClient
from mulligan.testing.compose import Project, image, missing, project
from tests.support.found import require, require_docker
from tests.support.paths import ROOT

IMAGE = os.environ.get("POSTGRES_IMAGE") or "pgvector/pgvector:pg18"
FILES = ("compose.yaml", "compose.postgres.yaml")
SERVICES = ("memory", "postgres")
PSQL = ("psql", "--username=mulligan", "--dbname=mulligan", "--tuples-only", "--no-align", "--command")

pytestmark = pytest.mark.timeout(900)  # the first build downloads packages


@pytest.fixture(scope="module")
def running() -> Iterator[Project]:
    require_docker(missing())
    try:
        image(IMAGE)
        problem = ""
    except ImageNotFound:
        problem = f"the engine does not have {IMAGE}: `docker pull` fetches it, POSTGRES_IMAGE names another"
    require(problem, "MULLIGAN_TEST_POSTGRES_IMAGE_REQUIRED")
    variables = {"MULLIGAN_TAG": "test-postgres", "POSTGRES_IMAGE": IMAGE}
    name = f"mulligan-test-{uuid4().hex[:8]}"
    with project(name, services=["memory"], files=FILES, folder=ROOT / "docker", variables=variables) as started:
        yield started


def fields_of(status: str) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)


async def test_entries_outlast_restarts_of_the_database_and_its_container(running: Project) -> None:
    client = MemoryClient(running.endpoint("memory"))
    origin = Provenance("run", "experience", "frozenlake", "train/00001", 3, 0.0, 1.0, True)
    added = [await client.add("first", "scope", "A is the player", origin)]
    for number, commands in enumerate((["restart"], ["kill"], ["kill", "rm --force"])):
        for command in commands:
            running.run(*command.split(), "postgres")
        running.run("up", "--detach", "--wait", "--no-build", "postgres")
        added.append(await client.add(f"after-{number}", "scope", f"B is the goal {number}", origin))
        assert [entry.reflection_id for entry in await client.list("scope")] == added
    await client.close()
    counted = running.execute("postgres", *PSQL, "SELECT count(*) FROM reflections")
    assert counted.stdout.split() == [str(len(added))], counted.stderr


def test_no_network_leads_to_the_database(running: Project) -> None:
    """Only loopback is in its container, and there nothing listens, either."""
    networks = running.inspect("postgres")["NetworkSettings"]["Networks"]
    assert set(networks) == {"none"} and not networks["none"]["IPAddress"]
    links = running.execute("postgres", "ls", "/sys/class/net").stdout.split()
    sockets = running.execute("postgres", "cat", "/proc/net/tcp", "/proc/net/tcp6").stdout.splitlines()
    assert links == ["lo"] and [line for line in sockets if "local_address" not in line] == []
    said = running.execute("postgres", *PSQL, "SHOW listen_addresses")
    assert said.returncode == 0 and said.stdout.strip() == ""


def test_the_memory_alone_reaches_the_socket(running: Project) -> None:
    listed = running.run("ps", "--all", "--format", "{{.Service}}").stdout.split()
    assert set(listed) == {*SERVICES, "tokens", "certs"}
    mounts = {name: {mount.get("Name"): mount for mount in running.inspect(name)["Mounts"]} for name in listed}
    (volume,) = mounts["memory"].keys() & mounts["postgres"].keys()
    assert {name for name in listed if volume in mounts[name]} == set(SERVICES)
    assert not mounts["memory"][volume]["RW"]
    assert running.execute("memory", "touch", "/run/postgresql/x").returncode != 0


def test_its_start_has_no_privileges(running: Project) -> None:
    """All of it: the image's first process has the user from the beginning."""
    state = running.inspect("postgres")
    assert state["HostConfig"]["ReadonlyRootfs"] and state["Config"]["User"] == "postgres"
    fields = fields_of(running.execute("postgres", "cat", "/proc/1/status").stdout)
    assert fields["Name"] == "postgres" and "0" not in fields["Uid"].split() + fields["Gid"].split()
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0 and fields["NoNewPrivs"] == "1"


def test_a_server_that_is_not_the_first_process_is_not_healthy(running: Project) -> None:
    """As the one is that the image runs while it makes the database."""
    kind, check = running.inspect("postgres")["Config"]["Healthcheck"]["Test"]
    assert kind == "CMD-SHELL" and running.execute("postgres", "sh", "-c", check).returncode == 0
    elsewhere = ("run", "--rm", "--no-deps", "--entrypoint", "sh", "postgres", "-c")
    answered = running.run(*elsewhere, "pg_isready", check=False)
    assert answered.returncode == 0, answered.stderr  # at the same socket
    assert running.run(*elsewhere, f"{check}; exit $?", check=False).returncode == 1
