"""The overlay with Prometheus, Jaeger and Grafana: its files name what is there. No image is pulled or started."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mulligan.common.config import ServiceSettings
from mulligan.env.config import EnvSettings
from mulligan.memory.config import MemorySettings
from mulligan.policy.config import PolicySettings
from mulligan.trainer.config import TrainerSettings
from tests.docker.test_compose import OURS, configuration, networks
from tests.support.paths import ROOT

FOLDER = ROOT / "docker"
VIEWERS = ("prometheus", "jaeger", "grafana")
SETTINGS: dict[str, type[ServiceSettings]] = {
    "env": EnvSettings,
    "policy": PolicySettings,
    "memory": MemorySettings,
    "trainer": TrainerSettings,
}


def read(path: str) -> Any:
    return yaml.safe_load((FOLDER / path).read_text())


@pytest.fixture(scope="module")
def overlay() -> dict[str, Any]:
    """As it is written, without compose."""
    found: dict[str, Any] = read("compose.observe.yaml")
    return found


def mounted(service: dict[str, Any]) -> dict[str, str]:
    """Source by the path inside."""
    return {each.split(":")[1]: each.split(":")[0] for each in service["volumes"]}


def test_each_service_of_ours_has_a_port_of_metrics_and_sends_spans(overlay: dict[str, Any]) -> None:
    for name, settings in SETTINGS.items():
        environment = overlay["services"][name]["environment"]
        prefix = f"MULLIGAN_{name.upper()}_"
        own = {key.removeprefix(prefix).lower() for key in environment if key.startswith(prefix)}
        assert own == {"metrics_port", "otlp_endpoint", "trace_ratio"} and own <= settings.model_fields.keys()
        assert environment[f"{prefix}OTLP_ENDPOINT"] == "https://jaeger:4317"
        assert environment["OTEL_EXPORTER_OTLP_CERTIFICATE"] == "/run/tls/ca.crt"
        assert not overlay["services"][name].get("ports"), "metrics have no port of this machine"


def test_what_is_mounted_is_there(overlay: dict[str, Any]) -> None:
    for name in VIEWERS:
        service = overlay["services"][name]
        for inside, source in mounted(service).items():
            if source.startswith("."):
                path = (FOLDER / source).resolve()
                assert path.exists() and path.is_relative_to(FOLDER), (name, source)
            else:
                assert source in overlay["volumes"], (name, inside)


def test_images_have_a_version_and_are_locked_down(overlay: dict[str, Any]) -> None:
    for name in VIEWERS:
        service = overlay["services"][name]
        assert re.fullmatch(r"\$\{[A-Z]+_IMAGE:-[\w./-]+:v?\d+\.\d+\.\d+\}", service["image"]), name
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["mem_limit"]
        assert service["security_opt"] == ["no-new-privileges"]
        (port,) = service["ports"]
        assert port.startswith("127.0.0.1:")


def test_no_password_is_in_a_file(overlay: dict[str, Any]) -> None:
    environment = overlay["services"]["grafana"]["environment"]
    named = {key: value for key, value in environment.items() if "PASSWORD" in key}
    assert named == {"GF_SECURITY_ADMIN_PASSWORD__FILE": "/run/grafana/admin-password"}
    made = mounted(overlay["services"]["grafana-password"])
    assert made["/run/tokens"] == mounted(overlay["services"]["grafana"])["/run/grafana"] == "grafana"
    command = " ".join(overlay["services"]["grafana-password"]["command"])
    assert "token_urlsafe(24)" in command and "umask 077" in command
    for path in (FOLDER / "observe").iterdir():
        assert not re.search(r"password|secret|token", path.read_text(), re.IGNORECASE), path


def test_prometheus_has_a_job_for_each_service(overlay: dict[str, Any]) -> None:
    jobs = read("observe/prometheus.yml")["scrape_configs"]
    assert [job["job_name"] for job in jobs] == list(OURS)
    for job in jobs:
        (found,) = job["dns_sd_configs"]
        port = overlay["services"][job["job_name"]]["environment"][f"MULLIGAN_{job['job_name'].upper()}_METRICS_PORT"]
        assert found == {"names": [job["job_name"]], "type": "A", "port": port}
    path = next(word for word in overlay["services"]["prometheus"]["command"] if "config.file" in word).split("=")[1]
    assert mounted(overlay["services"]["prometheus"])[path] == "./observe/prometheus.yml"


def test_grafana_finds_its_sources_and_the_dashboard(overlay: dict[str, Any]) -> None:
    sources = {each["uid"]: each for each in read("observe/grafana-sources.yaml")["datasources"]}
    ports = {name: overlay["services"][name]["ports"][0].rpartition(":")[2] for name in VIEWERS}
    assert {uid: each["url"] for uid, each in sources.items()} == {
        name: f"http://{name}:{ports[name]}" for name in ("prometheus", "jaeger")
    }
    dashboard = json.loads((FOLDER / "grafana" / "mulligan.json").read_text())
    used = {panel["datasource"]["uid"] for panel in dashboard["panels"] if "datasource" in panel}
    assert used == {"prometheus"} and sources["prometheus"]["isDefault"]
    (provider,) = read("observe/grafana-dashboards.yaml")["providers"]
    assert mounted(overlay["services"]["grafana"])[provider["options"]["path"]] == "./grafana"
    home = overlay["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(provider["options"]["path"]) and (FOLDER / "grafana" / Path(home).name).exists()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_jaeger_takes_spans_over_tls_with_a_certificate_of_its_own(overlay: dict[str, Any]) -> None:
    config = read("observe/jaeger.yaml")
    grpc = config["receivers"]["otlp"]["protocols"]["grpc"]
    assert grpc["endpoint"].endswith(":4317")
    assert grpc["tls"] == {"cert_file": "/run/tls/tls.crt", "key_file": "/run/tls/tls.key"}
    pipeline = config["service"]["pipelines"]["traces"]
    for kind in ("receivers", "processors", "exporters"):
        assert set(pipeline[kind]) <= set(config[kind])
    assert set(config["service"]["extensions"]) == set(config["extensions"])
    backends = config["extensions"]["jaeger_storage"]["backends"]
    assert config["extensions"]["jaeger_query"]["storage"]["traces"] in backends
    assert config["exporters"]["jaeger_storage_exporter"]["trace_storage"] in backends
    certs = overlay["services"]["certs"]
    assert certs["entrypoint"][-2:] == ["--other", "jaeger"]
    source = mounted(overlay["services"]["jaeger"])["/run/tls"]
    assert mounted(certs)["/run/certs/others/jaeger"] == source
    base = read("compose.yaml")["services"]["certs"]["entrypoint"]
    assert certs["entrypoint"][:-2] == base, "but for that, as in compose.yaml"


def test_env_reaches_the_trainer_and_what_watches_it() -> None:
    found = configuration("compose.yaml", "compose.observe.yaml")
    reached = networks(found["services"])
    assert found["networks"]["env-observe"]["internal"] and found["networks"]["observe"]["internal"]
    assert {name for name in reached if reached[name] & reached["env"]} == {"env", "trainer", "prometheus", "jaeger"}
    ports = {name: service.get("ports") for name, service in found["services"].items()}
    assert not ports["env"] and {port["target"] for each in ports.values() for port in each or ()}.isdisjoint({9464})
