"""A stranger at every rendering of compose and Kubernetes. No engine is asked: what compose renders, and the manifests,
say who reaches which port, and with which settings a service starts. A server is made with these settings, here, and a
stranger calls it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from mulligan.common.access import ACCESS, AccessRole
from mulligan.common.certificates import Certificates
from mulligan.common.config import ServiceSettings
from mulligan.common.guarded import GuardedSettings
from mulligan.common.server import serve
from mulligan.common.tokens import bearer
from mulligan.env.config import EnvSettings
from mulligan.env.v1 import env_service_pb2_grpc
from mulligan.memory.config import MemorySettings
from mulligan.memory.v1 import memory_service_pb2_grpc
from mulligan.policy.config import PolicySettings
from mulligan.policy.v1 import policy_admin_service_pb2_grpc, policy_service_pb2_grpc
from mulligan.testing.compose import missing_compose
from mulligan.trainer.config import TrainerSettings
from mulligan.trainer.v1 import learner_service_pb2_grpc, run_service_pb2_grpc
from tests.support.found import require_docker
from tests.support.paths import ROOT
from tests.support.tokens import token_of, write_tokens

FOLDER = ROOT / "docker"
OVERLAYS = sorted(path.name for path in FOLDER.glob("compose.*.yaml"))
RENDERINGS = [("compose.yaml",), *(("compose.yaml", overlay) for overlay in OVERLAYS), ("compose.yaml", *OVERLAYS)]
SETTINGS: Mapping[str, type[ServiceSettings]] = {
    "env": EnvSettings,
    "policy": PolicySettings,
    "memory": MemorySettings,
    "trainer": TrainerSettings,
}
SERVICERS: Mapping[str, Sequence[tuple[Any, str]]] = {
    "env": [(env_service_pb2_grpc, "EnvService")],
    "policy": [(policy_service_pb2_grpc, "PolicyService"), (policy_admin_service_pb2_grpc, "PolicyAdminService")],
    "memory": [(memory_service_pb2_grpc, "MemoryService")],
    "trainer": [(run_service_pb2_grpc, "RunService"), (learner_service_pb2_grpc, "LearnerService")],
}
# What else listens, by container and port: what it asks for, and which containers reach it at most. On Linux users of
# the machine reach it, too, also in internal networks.
OTHERS: Mapping[tuple[str, int], tuple[str, set[str]]] = {
    ("sglang", 30000): ("its key", {"policy"}),
    ("prometheus", 9090): ("nothing: it has numbers", {*SETTINGS, "jaeger", "grafana"}),
    ("jaeger", 4317): ("nothing; it speaks TLS", {*SETTINGS, "prometheus", "grafana"}),
    ("jaeger", 16686): ("nothing: it has names and durations of calls", {*SETTINGS, "prometheus", "grafana"}),
    ("grafana", 3000): ("its password", {*SETTINGS, "prometheus", "jaeger"}),
}
INSECURE: Mapping[tuple[str, str], str] = {}  # containers that may be open, by overlay and name: why
_END_BY_THEMSELVES = "no"  # `restart` of containers that make something, and listen to nothing


@cache
def rendered(*files: str) -> dict[str, Any]:
    """As compose reads these files together. Skips without compose, where it need not be there."""
    require_docker(missing_compose())
    command = ["docker", "compose", *(word for file in files for word in ("-f", str(FOLDER / file)))]
    found = subprocess.run(
        [*command, "config", "--format", "json"],
        env={**os.environ, "MODEL": "some/model"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    read: dict[str, Any] = json.loads(found.stdout)
    return read


def dockerfile(name: str) -> str:
    return (FOLDER / f"{name}.Dockerfile").read_text()


def ports_of(name: str, service: Mapping[str, Any]) -> set[int]:
    """What the container listens to. Fails for one that nobody has declared."""
    if name in SETTINGS:  # metrics are a port of their own, which nobody publishes
        return {int(port) for port in re.findall(r"^EXPOSE (\d+)$", dockerfile(name), re.MULTILINE)}
    if service.get("network_mode") == "none" or service.get("restart") == _END_BY_THEMSELVES:
        return set()
    found = {port for other, port in OTHERS if other == name}
    assert found, f"{name}: declare in OTHERS what it listens to, what it asks for, and who reaches it"
    return found


def networks_of(service: Mapping[str, Any]) -> set[str]:
    return set() if service.get("network_mode") == "none" else set(service.get("networks") or {"default"})


def reached_by(services: Mapping[str, Mapping[str, Any]], called: str) -> set[str]:
    """The other containers that share a network with it."""
    theirs = networks_of(services[called])
    return {name for name, service in services.items() if name != called and theirs & networks_of(service)}


@pytest.fixture(params=RENDERINGS, ids=lambda files: "+".join(file.removesuffix(".yaml") for file in files))
def files(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return tuple(request.param)


def test_each_port_is_reached_by_whom_it_is_declared_for(files: tuple[str, ...]) -> None:
    """And published to this machine alone. What asks for no token of ours is reached by need. PostgreSQL asks for
    nothing, and is in no network."""
    services = rendered(*files)["services"]
    if "postgres" in services:
        assert services["postgres"]["network_mode"] == "none" and not ports_of("postgres", services["postgres"])
    for name, service in services.items():
        ports = ports_of(name, service)
        for published in service.get("ports", []):
            assert published["host_ip"] == "127.0.0.1" and published["target"] in ports, (name, published)
        for port in ports if name not in SETTINGS else ():
            _, callers = OTHERS[name, port]
            assert reached_by(services, name) <= callers, (name, port)
    assert reached_by(services, "env") <= {"trainer", "prometheus", "jaeger"}, "it runs the code of environments"


@dataclass(frozen=True)
class Container:
    """One of ours, as it is started."""

    name: str
    environment: Mapping[str, str]
    arguments: Sequence[str]


def container_of(files: tuple[str, ...], name: str) -> Container:
    service = rendered(*files)["services"][name]
    assert not service.get("entrypoint"), "the image's own"
    variables = {variable: str(value) for variable, value in (service.get("environment") or {}).items()}
    return Container(name, variables, service.get("command") or [])


def pod_of(name: str) -> Container:
    manifests = yaml.safe_load_all((FOLDER / "kubernetes" / f"{name}.yaml").read_text())
    (workload,) = [one for one in manifests if one["kind"] in ("Deployment", "StatefulSet")]
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    assert "command" not in container, "the image's own"
    variables = {variable["name"]: variable["value"] for variable in container.get("env", [])}
    return Container(name, variables, container.get("args") or [])


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """/run of a container, with what `tokens` and `certs` make."""
    folder = tmp_path_factory.mktemp("run")
    write_tokens(folder).rename(folder / "env-tokens")
    write_tokens(folder)
    Certificates(folder / "made").update()
    (folder / "engine-key").mkdir()
    (folder / "engine-key" / "key").write_text("a-key\n")
    return folder


def settings_of(container: Container, secrets: Path, patch: pytest.MonkeyPatch, folder: Path) -> Any:
    """Those that the service reads: of the image, of the rendering, of the command. Its folders are here."""
    prefix = f"MULLIGAN_{container.name.upper()}_"
    image = dict(re.findall(rf"({prefix}\w+)=(\S+)", dockerfile(container.name)))
    places = {"/run/tls": secrets / "made" / "services" / container.name, "/run": secrets, "/data": folder}
    for variable in [variable for variable in os.environ if variable.startswith("MULLIGAN_")]:
        patch.delenv(variable)
    for variable, value in (image | dict(container.environment)).items():
        if variable.startswith(prefix):
            place = next((one for one in places if value.startswith(f"{one}/") or value == one), "")
            patch.setenv(variable, f"{places[place]}{value.removeprefix(place)}" if place else value)
    return SETTINGS[container.name].load(container.arguments)


@asynccontextmanager
async def server_of(name: str, settings: Any) -> AsyncIterator[str]:
    """With these settings, at a port of loopback; it can do nothing."""
    started = asyncio.get_running_loop().create_future()

    async def on_started(address: str) -> None:
        started.set_result(address)

    def register(server: grpc.aio.Server) -> list[str]:
        for module, service in SERVICERS[name]:
            getattr(module, f"add_{service}Servicer_to_server")(getattr(module, f"{service}Servicer")(), server)
        return served(name)

    changed = {"host": "127.0.0.1", "port": 0, "metrics_port": -1, "otlp_endpoint": ""}
    known = {field: value for field, value in changed.items() if field in type(settings).model_fields}
    at_loopback = settings.model_copy(update=known)
    serving = asyncio.create_task(serve(at_loopback, register, on_started=on_started))
    await asyncio.wait([started, serving], return_when=asyncio.FIRST_COMPLETED)
    try:
        yield started.result()
    finally:
        serving.cancel()
        await asyncio.wait([serving])


def served(name: str) -> list[str]:
    return [f"mulligan.{name}.v1.{service}" for _, service in SERVICERS[name]]


async def code_of(channel: grpc.aio.Channel, method: str, token: str = "") -> grpc.StatusCode:
    call: Any = channel.unary_stream(method)
    try:
        async for _ in call(b"", metadata=bearer(token) if token else None, timeout=10):
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def check(container: Container, secrets: Path, patch: pytest.MonkeyPatch, folder: Path) -> None:
    """A stranger gets no answer without TLS, and with TLS none without a token. Who has one gets in."""
    settings = settings_of(container, secrets, patch, folder)
    assert settings.host == "0.0.0.0" and not settings.insecure
    if isinstance(settings, GuardedSettings):
        assert settings.guard.is_set, "writes need the credential of a run"
    if isinstance(settings, TrainerSettings):
        for called in ("env", "policy", "memory"):
            endpoint = settings.endpoint(called)
            assert endpoint.tls is not None and endpoint.token_file is not None, called
    methods = [f"/{service}/{call}" for service in served(container.name) for call in ACCESS[service]]
    ca = (secrets / "made" / "services" / container.name / "ca.crt").read_bytes()
    async with server_of(container.name, settings) as address:
        async with grpc.aio.insecure_channel(address) as channel:
            assert await code_of(channel, methods[0], token_of(AccessRole.ADMIN)) is grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca)) as channel:
            for method in methods:
                for token in ("", "no-token-of-anybody"):
                    assert await code_of(channel, method, token) is grpc.StatusCode.UNAUTHENTICATED, method
                let_in = await code_of(channel, method, token_of(AccessRole.ADMIN))
                assert let_in in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INVALID_ARGUMENT), (method, let_in)


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as found:
        yield found


@pytest.mark.parametrize("name", SETTINGS)
async def test_a_stranger_at_compose_is_refused(
    files: tuple[str, ...], name: str, secrets: Path, patch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not any((file, name) in INSECURE for file in files):
        await check(container_of(files, name), secrets, patch, tmp_path)


@pytest.mark.parametrize("name", SETTINGS)
async def test_a_stranger_at_kubernetes_is_refused(
    name: str, secrets: Path, patch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    await check(pod_of(name), secrets, patch, tmp_path)


def test_an_open_service_would_be_noticed(secrets: Path, patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without its folder of tokens, or its certificate, it does not start; with `--insecure` the checks above fail."""
    pod = pod_of("memory")
    for missing in ("_MEMORY_TLS_", "TOKENS"):
        variables = {name: value for name, value in pod.environment.items() if missing not in name}
        with pytest.raises(SystemExit):
            settings_of(Container("memory", variables, []), secrets, patch, tmp_path)
    opened = settings_of(Container("memory", variables, ["--insecure"]), secrets, patch, tmp_path)
    assert opened.insecure and opened.tokens is None
