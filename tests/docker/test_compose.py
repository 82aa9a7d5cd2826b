"""What the compose files promise, as compose itself reads them; no engine is asked."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

from mulligan.testing.compose import missing_compose
from tests.support.found import require_docker
from tests.support.paths import ROOT

OURS = ("env", "policy", "memory", "trainer")
FILES = (
    "compose.yaml",
    "compose.gpu.yaml",
    "compose.scale.yaml",
    "compose.postgres.yaml",
    "compose.env.yaml",
    "compose.observe.yaml",
)


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


@pytest.fixture(
    params=[FILES[:1], *((FILES[0], over) for over in FILES[1:])],
    ids=["cpu", "gpu", "scale", "postgres", "env", "observe"],
)
def services(request: pytest.FixtureRequest) -> dict[str, Any]:
    read: dict[str, Any] = configuration(*request.param)["services"]
    return read


def test_every_service_of_ours_is_locked_down(services: dict[str, Any]) -> None:
    one_shot = {"tokens", "certs"}
    assert set(services) >= {*OURS, *one_shot}
    for name in (*OURS, *one_shot):
        service = services[name]
        assert service["read_only"] and service["init"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges"] and "privileged" not in service, name
        assert name in one_shot or int(service["mem_limit"]) > 0, name


def test_ports_are_open_to_this_machine_alone(services: dict[str, Any]) -> None:
    ports = {name: service.get("ports", []) for name, service in services.items()}
    assert {port["host_ip"] for each in ports.values() for port in each} == {"127.0.0.1"}


def test_no_credential_is_in_a_variable(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for variable, value in (service.get("environment") or {}).items():
            if "TOKEN" in variable or "KEY" in variable:
                assert variable.endswith(("_FILE", "_FOLDER", "_TLS_KEY", "_RUN_KEYS")), (name, variable)
                assert value.startswith("/run/"), (name, variable)
            else:
                assert "token" not in str(value).lower(), (name, variable)


def test_what_must_last_is_in_a_volume() -> None:
    read = configuration("compose.yaml")
    targets = {
        name: {volume["target"]: volume.get("source") for volume in read["services"][name].get("volumes", [])}
        for name in OURS
    }
    assert targets["memory"] == {"/data/memory": "memory", "/run/tokens": "tokens", "/run/tls": "memory-tls"}
    assert {"/data/runs", "/data/checkpoints", "/data/weights"} <= set(targets["trainer"])
    assert targets["policy"]["/data/weights"] == targets["trainer"]["/data/weights"] == "weights"
    assert targets["policy"]["/data/policy"] == "policy"
    assert set(read["volumes"]) - {"certs"} == {source for each in targets.values() for source in each.values()}


def test_env_has_tokens_of_its_own(services: dict[str, Any]) -> None:
    """It runs the code of environments, which could read what it is given."""
    assert [volume["target"] for volume in services["env"]["volumes"]] == ["/run/env-tokens", "/run/tls"]
    for name in OURS:
        folder = services[name]["environment"][f"MULLIGAN_{name.upper()}_TOKENS_FOLDER"]
        assert folder == ("/run/env-tokens" if name == "env" else "/run/tokens")
        assert folder in {volume["target"] for volume in services[name]["volumes"]}
        assert services[name]["depends_on"]["tokens"]["condition"] == "service_completed_successfully"


def test_all_speak_tls_each_with_a_key_of_its_own(services: dict[str, Any]) -> None:
    """`insecure` is nowhere but between the policy and SGLang, which speaks no TLS. Probes and the trainer trust the
    authority, whose key is with `certs` alone."""
    made = {volume["target"]: volume["source"] for volume in services["certs"]["volumes"]}
    for name in OURS:
        environment = services[name]["environment"]
        assert environment[f"MULLIGAN_{name.upper()}_TLS_CERTIFICATE"] == "/run/tls/tls.crt"
        assert environment[f"MULLIGAN_{name.upper()}_TLS_KEY"] == "/run/tls/tls.key"
        assert environment["MULLIGAN_HEALTHCHECK_TLS_CA"] == "/run/tls/ca.crt"
        allowed = {"MULLIGAN_POLICY_SGLANG__INSECURE"} if "sglang" in services and name == "policy" else set()
        assert {variable for variable in environment if "INSECURE" in variable} == allowed
        (volume,) = [volume for volume in services[name]["volumes"] if volume["target"] == "/run/tls"]
        assert volume["read_only"] and made[f"/run/certs/services/{name}"] == volume["source"]
        assert services[name]["depends_on"]["certs"]["condition"] == "service_completed_successfully"
    of_ours = {source for target, source in made.items() if not target.startswith("/run/certs/others/")}
    assert len(of_ours) == len(OURS) + 1 and len(set(made.values())) == len(made)
    used = [volume.get("source") for name in services for volume in services[name].get("volumes", [])]
    assert used.count(made["/run/certs"]) == 1
    trainer = services["trainer"]["environment"]
    trusts = [variable for variable in trainer if variable.endswith("_TLS_CA")]
    assert len(trusts) == 5 and {trainer[variable] for variable in trusts} == {"/run/tls/ca.crt"}


def test_writes_need_the_credential_of_a_run(services: dict[str, Any]) -> None:
    """The keys come with the certificates: the private one to the trainer, the public one to the memory."""
    keys = {name: services[name]["environment"].get(f"MULLIGAN_{name.upper()}_RUN_KEYS") for name in OURS}
    assert keys == {"env": None, "policy": None} | dict.fromkeys(("memory", "trainer"), "/run/tls/run-keys.pem")


def networks(services: dict[str, Any]) -> dict[str, set[str]]:
    alone = {name for name, service in services.items() if service.get("network_mode") == "none"}
    return {name: set(services[name].get("networks") or {"default"}) for name in set(services) - alone}


@pytest.mark.parametrize("over", FILES[:1] + FILES[1:4])
def test_env_reaches_the_trainer_alone(over: str) -> None:
    """Their network leads nowhere else. So it has no port, either: an engine opens none of such a network. What env has
    counts for nothing at the trainer's port: it has other tokens, and the trainer asks for one."""
    read = configuration(*dict.fromkeys((FILES[0], over)))
    found = networks(read["services"])
    assert found["env"] == {"env"} and read["networks"]["env"]["internal"]
    assert {name for name in found if found[name] & found["env"]} == {"env", "trainer"}
    assert "default" in found["trainer"] and not read["services"]["env"].get("ports")
    places = {
        name: {
            volume["source"]
            for volume in read["services"][name]["volumes"]
            if volume["target"] == read["services"][name]["environment"][f"MULLIGAN_{name.upper()}_TOKENS_FOLDER"]
        }
        for name in ("env", "trainer")
    }
    assert places["env"] and places["trainer"] and places["env"].isdisjoint(places["trainer"])


def test_a_file_of_its_own_opens_env_to_this_machine_and_to_others() -> None:
    read = configuration("compose.yaml", "compose.env.yaml")
    found = networks(read["services"])
    assert found["env"] == {"env", "outside"} and not read["networks"]["outside"].get("internal")
    assert {name for name in found if "outside" in found[name]} == {"env"}
    assert [port["target"] for port in read["services"]["env"]["ports"]] == [50051]


def test_the_policy_alone_reaches_the_engine_and_needs_its_key() -> None:
    read = configuration("compose.yaml", "compose.gpu.yaml")
    engine, policy = read["services"]["sglang"], read["services"]["policy"]
    found = networks(read["services"])
    assert found["sglang"] == {"engine", "hub"} and read["networks"]["engine"]["internal"]
    assert {name for name in found if found[name] & found["sglang"]} == {"sglang", "policy"}
    assert not engine.get("ports") and engine["user"] == "10001:10001"
    config = engine["command"][engine["command"].index("--config") + 1]
    key = policy["environment"]["MULLIGAN_POLICY_SGLANG__API_KEY_FILE"]
    for path, service in ((config, engine), (key, policy)):
        assert [volume["source"] for volume in service["volumes"] if path.startswith(volume["target"])] == [
            "engine-key"
        ]
    assert not [word for word in engine["command"] if "api-key" in word]
    assert "--load-format=safetensors" in engine["command"]
    # Without `insecure` the policy would refuse to send the key without TLS, which SGLang does not speak.
    assert policy["environment"]["MULLIGAN_POLICY_SGLANG__SERVERS"] == '["http://sglang:30000"]'
    assert policy["environment"]["MULLIGAN_POLICY_SGLANG__INSECURE"] == "true"


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


@pytest.mark.parametrize("others", [(), FILES[1:3] + FILES[4:]], ids=["alone", "with the others"])
def test_only_the_memory_service_reaches_the_database(others: Sequence[str]) -> None:
    """It listens on no network, and nobody else mounts the folder of its socket. So it needs no password."""
    services = configuration("compose.yaml", "compose.postgres.yaml", *others)["services"]
    memory, postgres = services["memory"], services["postgres"]
    assert postgres["network_mode"] == "none" and not postgres.get("ports") and not postgres.get("networks")
    assert "listen_addresses=" in postgres["command"] and "postgres" in memory["build"]["args"]["EXTRAS"]
    assert "trust" not in postgres["environment"].values()
    mounts = {
        name: {volume.get("source"): volume for volume in service.get("volumes", [])}
        for name, service in services.items()
    }
    for volume, mounting in (("postgres-socket", {"memory", "postgres"}), ("postgres", {"postgres"})):
        assert {name for name in mounts if volume in mounts[name]} == mounting
    assert mounts["memory"]["postgres-socket"]["read_only"]
    folder = mounts["memory"]["postgres-socket"]["target"]
    assert memory["environment"]["MULLIGAN_MEMORY_DATABASE"].endswith(f"@/mulligan?host={folder}")
    assert memory["depends_on"]["postgres"]["condition"] == "service_healthy"


def test_the_database_has_no_privileges() -> None:
    postgres = configuration("compose.yaml", "compose.postgres.yaml")["services"]["postgres"]
    assert postgres["read_only"] and postgres["cap_drop"] == ["ALL"] and not postgres.get("cap_add")
    assert postgres["user"] == "postgres" and postgres["security_opt"] == ["no-new-privileges"]


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
