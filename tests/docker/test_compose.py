"""What the compose files promise, as compose itself reads them; no engine is asked."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from mulligan.testing.compose import missing_compose
from tests.support.found import require_docker
from tests.support.paths import ROOT

OURS = ("env", "policy", "memory", "trainer")
FILES = ("compose.yaml", "compose.gpu.yaml", "compose.scale.yaml", "compose.postgres.yaml")


def compose(*files: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`docker compose config` over these files. Skips without compose, where it need not be there."""
    require_docker(missing_compose())
    command = ["docker", "compose", *(word for file in files for word in ("-f", f"docker/{file}"))]
    return subprocess.run(
        [*command, "config", "--format", "json"],
        cwd=ROOT,
        env={**{name: value for name, value in os.environ.items() if name != "TORCH_INDEX"}, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def configuration(*files: str) -> dict[str, Any]:
    found = compose(*files, MODEL="some/model")
    assert found.returncode == 0, found.stderr
    read: dict[str, Any] = json.loads(found.stdout)
    return read


@pytest.fixture(params=[FILES[:1], *((FILES[0], over) for over in FILES[1:])], ids=["cpu", "gpu", "scale", "postgres"])
def services(request: pytest.FixtureRequest) -> dict[str, Any]:
    read: dict[str, Any] = configuration(*request.param)["services"]
    return read


def test_every_service_of_ours_is_locked_down(services: dict[str, Any]) -> None:
    assert set(services) >= {*OURS, "tokens"}
    for name in (*OURS, "tokens"):
        service = services[name]
        assert service["read_only"] and service["init"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges"] and "privileged" not in service, name
        assert name == "tokens" or int(service["mem_limit"]) > 0, name


def test_ports_are_open_to_this_machine_alone(services: dict[str, Any]) -> None:
    ports = {name: service.get("ports", []) for name, service in services.items()}
    assert {port["host_ip"] for each in ports.values() for port in each} == {"127.0.0.1"}


def test_no_credential_is_in_a_variable(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for variable, value in (service.get("environment") or {}).items():
            if "TOKEN" in variable or "KEY" in variable:
                assert variable.endswith(("_FILE", "_FOLDER")) and value.startswith("/run/"), (name, variable)
            else:
                assert "token" not in str(value).lower(), (name, variable)


def test_what_must_last_is_in_a_volume() -> None:
    read = configuration("compose.yaml")
    targets = {
        name: {volume["target"]: volume.get("source") for volume in read["services"][name].get("volumes", [])}
        for name in OURS
    }
    assert targets["memory"] == {"/data/memory": "memory", "/run/tokens": "tokens"}
    assert {"/data/runs", "/data/checkpoints", "/data/weights"} <= set(targets["trainer"])
    assert targets["policy"]["/data/weights"] == targets["trainer"]["/data/weights"] == "weights"
    assert targets["policy"]["/data/policy"] == "policy"
    assert set(read["volumes"]) == {source for each in targets.values() for source in each.values()}


def test_env_has_tokens_of_its_own(services: dict[str, Any]) -> None:
    """It runs the code of environments, which could read what it is given."""
    assert [volume["target"] for volume in services["env"]["volumes"]] == ["/run/env-tokens"]
    for name in OURS:
        folder = services[name]["environment"][f"MULLIGAN_{name.upper()}_TOKENS_FOLDER"]
        assert folder == ("/run/env-tokens" if name == "env" else "/run/tokens")
        assert folder in {volume["target"] for volume in services[name]["volumes"]}
        assert services[name]["depends_on"]["tokens"]["condition"] == "service_completed_successfully"


def test_env_reaches_the_trainer_alone(services: dict[str, Any]) -> None:
    networks = {name: set(service.get("networks") or {"default"}) for name, service in services.items()}
    assert networks["env"] == {"env"}
    assert {name for name in services if networks[name] & networks["env"]} == {"env", "trainer"}
    assert "default" in networks["trainer"]


def test_a_replica_shares_no_state_and_no_port() -> None:
    services = configuration("compose.yaml", "compose.scale.yaml")["services"]
    for name in ("env", "policy"):
        assert services[name]["deploy"]["replicas"] == 2 and not services[name].get("ports")
    state = [volume for volume in services["policy"]["volumes"] if volume["target"] == "/data/policy"]
    assert len(state) == 1 and "source" not in state[0]


def test_gpus_are_reserved_and_the_model_must_be_named() -> None:
    services = configuration("compose.yaml", "compose.gpu.yaml")["services"]
    for name in ("sglang", "trainer"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
    assert services["policy"]["environment"]["MULLIGAN_POLICY_SGLANG__SERVERS"] == '["http://sglang:30000"]'
    assert services["policy"]["environment"]["MULLIGAN_POLICY_MODEL"] == "some/model"
    nameless = compose("compose.yaml", "compose.gpu.yaml", MODEL="")
    assert nameless.returncode != 0 and "MODEL is the model to train" in nameless.stderr


def test_only_the_memory_service_reaches_the_database() -> None:
    read = configuration("compose.yaml", "compose.postgres.yaml")
    assert read["networks"]["database"]["internal"]
    reached = {name for name, service in read["services"].items() if "database" in (service.get("networks") or {})}
    assert reached == {"memory", "postgres"} and not read["services"]["postgres"].get("ports")
    assert "postgres" in read["services"]["memory"]["build"]["args"]["EXTRAS"]
    assert read["services"]["postgres"]["volumes"][0]["source"] == "postgres"


@pytest.mark.parametrize("index", ["", "https://mirror.example.org/whl/cpu"])
def test_torch_is_built_for_the_cpu_unless_another_index_is_named(index: str) -> None:
    """An empty one counts as named: it is pip's own."""
    by_default = compose("compose.yaml")
    named = compose("compose.yaml", TORCH_INDEX=index)
    for read, expected in ((by_default, "https://download.pytorch.org/whl/cpu"), (named, index)):
        assert read.returncode == 0, read.stderr
        services = json.loads(read.stdout)["services"]
        assert {services[name]["build"]["args"]["TORCH_INDEX"] for name in ("env", "policy", "trainer")} == {expected}


def test_the_two_large_images_share_their_largest_layer() -> None:
    """The stage with torch is the same text in both, so that a builder makes it once."""
    stages = [(ROOT / f"docker/{name}.Dockerfile").read_text().split("\nFROM ")[1] for name in ("policy", "trainer")]
    assert stages[0].startswith("${BASE} AS torch") and stages[0] == stages[1]


@pytest.mark.parametrize("name", OURS)
def test_builds_see_what_they_need_and_nothing_else(name: str) -> None:
    """Every folder that is copied exists, and the context is a list of what may be seen."""
    text = (ROOT / f"docker/{name}.Dockerfile").read_text()
    copied = [word for line in text.splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]]
    sources = [source for source in copied if not source.startswith(("-", "/"))]
    assert sources and all((ROOT / source).exists() for source in sources)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    assert ignored[1] == "*" and ".git" not in allowed and "runs" not in allowed
    assert "gcc" not in text and "apt-get" not in text
