"""The manifests, checked without a cluster: against the published schemas, and against images and settings."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from mulligan.common.access import AccessRole
from mulligan.common.certificates import default_names
from mulligan.common.config import ServiceSettings
from mulligan.env.config import EnvSettings
from mulligan.memory.config import MemorySettings
from mulligan.policy.config import PolicySettings
from mulligan.trainer.config import TrainerSettings
from tests.support.paths import ROOT

FOLDER = ROOT / "docker" / "kubernetes"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
MANIFESTS: list[dict[str, Any]] = [
    manifest for name in KUSTOMIZATION["resources"] for manifest in yaml.safe_load_all((FOLDER / name).read_text())
]
DOCS = (ROOT / "docs" / "docker.md").read_text()
PORTS = range(50051, 50055)
SETTINGS: dict[str, type[ServiceSettings]] = {
    "env": EnvSettings,
    "policy": PolicySettings,
    "memory": MemorySettings,
    "trainer": TrainerSettings,
}


def workload(name: str) -> dict[str, Any]:
    (found,) = [m for m in MANIFESTS if m["kind"] in ("Deployment", "StatefulSet") and name in m["metadata"]["name"]]
    return found


def dockerfile(name: str) -> str:
    return (ROOT / "docker" / f"{name}.Dockerfile").read_text()


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda m: f"{m['kind']}-{m['metadata']['name']}")
def test_each_follows_the_schema(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_the_schema_notices_a_mistake() -> None:
    planted = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"clusterIp": "None"}}
    with pytest.raises(kubernetes_validate.ValidationError, match="clusterIp"):
        kubernetes_validate.validate(planted, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_service_is_probed_reached_and_locked_down(name: str) -> None:
    pod = workload(name)["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    (service,) = [m for m in MANIFESTS if m["kind"] == "Service" and m["metadata"]["name"] == f"mulligan-{name}"]
    exposed = re.search(r"^EXPOSE (\d+)$", dockerfile(name), re.MULTILINE)
    assert exposed is not None
    port = int(exposed[1])
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["ports"][0]["port"] == port
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert workload(name)["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert [each["containerPort"] for each in container["ports"]] == [port]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):  # those of Kubernetes speak no TLS
        check = ["python", "-m", "mulligan.common.healthcheck", f"127.0.0.1:{port}"]
        assert container[probe]["exec"]["command"][:4] == check and container[probe]["timeoutSeconds"] >= 5
    health = re.search(r"HEALTHCHECK .*\n +CMD (.*)", dockerfile(name))
    assert health is not None and json.loads(health[1]) == check
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    security = pod["spec"]["securityContext"]
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}" in dockerfile(name)
    assert security["runAsNonRoot"] and security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["spec"]["automountServiceAccountToken"] is pod["spec"]["enableServiceLinks"] is False


@pytest.mark.parametrize("name", SETTINGS)
def test_variables_name_settings_and_volumes_are_where_the_image_keeps_things(name: str) -> None:
    spec = workload(name)["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    prefix = f"MULLIGAN_{name.upper()}_"
    variables = [variable["name"] for variable in container.get("env", [])]
    assert all(variable.startswith((prefix, "MULLIGAN_CLI_", "MULLIGAN_HEALTHCHECK_TLS_")) for variable in variables)
    assert {v.removeprefix(prefix).lower() for v in variables if v.startswith(prefix)} <= set(
        SETTINGS[name].model_fields
    )
    claims = {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == claims | volumes
    assert all(path == "/tmp" or path in dockerfile(name).split() for path in mounts.values())


def test_addresses_are_those_of_services() -> None:
    services = {m["metadata"]["name"]: m["spec"]["ports"][0]["port"] for m in MANIFESTS if m["kind"] == "Service"}
    found = 0
    for name in SETTINGS:
        for variable in workload(name)["spec"]["template"]["spec"]["containers"][0].get("env", []):
            if address := re.fullmatch(r"(?:dns:///)?([a-z-]+):(\d+)", variable["value"]):
                assert services[address[1]] == int(address[2])
                found += 1
    assert found == 5


def test_env_has_tokens_of_its_own() -> None:
    """It runs the code of environments, which could read what it is given."""
    secrets = {
        name: {
            v["secret"]["secretName"] for v in workload(name)["spec"]["template"]["spec"]["volumes"] if "secret" in v
        }
        for name in SETTINGS
    }
    own, others = {"mulligan-env"}, {"mulligan"}
    tokens = {"env": own, "policy": others, "memory": others, "trainer": own | others}
    assert secrets == {name: {*tokens[name], f"mulligan-{name}-tls"} for name in SETTINGS}


@pytest.mark.parametrize("name", SETTINGS)
def test_all_speak_tls(name: str) -> None:
    """As `mulligan certs` names the files of a service, which docs/docker.md makes a secret of."""
    pod = workload(name)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    paths = {variable: value for variable, value in variables.items() if "_TLS_" in variable}
    files = {"tls.crt", "tls.key", "ca.crt"}
    assert {value.rpartition("/")[2] for value in paths.values()} == files
    assert {value.rpartition("/")[0] for value in paths.values()} == {"/run/tls"}
    assert not [variable for variable in variables if "INSECURE" in variable]
    (secret,) = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "tls"]
    command = re.search(r"kubectl create secret generic (mulligan-\$name-tls) --from-file=certs/services/\$name", DOCS)
    assert command is not None and command[1].replace("$name", name) == secret["secretName"]
    keys = "/run/tls/run-keys.pem" if name in ("memory", "trainer") else None
    assert variables.get(f"MULLIGAN_{name.upper()}_RUN_KEYS") == keys
    if name == "trainer":
        assert {f"MULLIGAN_TRAINER_{called}_TLS_CA" for called in ("ENV", "POLICY", "MEMORY")} <= set(paths)


def test_certificates_are_for_the_names_by_which_services_are_called() -> None:
    for name in SETTINGS:
        assert f"mulligan-{name}" in default_names(name)


def selects(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
    return selector is not None and (selector.get("matchLabels") or {}).items() <= labels.items()


def peers(rules: list[dict[str, Any]], side: str) -> list[tuple[dict[str, Any], int]]:
    """Selectors and ports that the rules allow; an empty selector for a peer or a port that is not restricted."""
    return [
        (peer.get("podSelector", {}), port["port"])
        for rule in rules
        for peer in rule.get(side, [{}])
        for port in rule.get("ports", [{"port": 0}])
    ]


def allowed(policies: list[dict[str, Any]], pods: dict[str, dict[str, str]]) -> set[tuple[str, str, int]]:
    """Who reaches whom at which port: both sides must allow it, where policies select them."""

    def may(name: str, direction: str, side: str, other: dict[str, str]) -> set[int]:
        mine = [
            policy["spec"]
            for policy in policies
            if selects(policy["spec"]["podSelector"], pods[name]) and direction in policy["spec"]["policyTypes"]
        ]
        if not mine:
            return set(PORTS)
        rules = [peer for spec in mine for peer in peers(spec.get(direction.lower(), []), side)]
        return {port for selector, port in rules if selects(selector, other)}

    return {
        (caller, called, port)
        for caller in pods
        for called in pods
        for port in may(caller, "Egress", "to", pods[called]) & may(called, "Ingress", "from", pods[caller])
    }


def test_pods_reach_one_another_by_need() -> None:
    pods = {name: dict(workload(name)["spec"]["template"]["metadata"]["labels"]) for name in SETTINGS}
    pods |= {"stranger": {}, "client": {"mulligan-client": "true"}}
    policies = [manifest for manifest in MANIFESTS if manifest["kind"] == "NetworkPolicy"]
    needed = {("trainer", "env", 50051), ("trainer", "policy", 50052), ("trainer", "memory", 50053)}
    found = {(caller, called, port) for caller, called, port in allowed(policies, pods) if called in SETTINGS}
    assert found == needed | {("client", "trainer", 50054)}


def test_env_reaches_nobody_at_all() -> None:
    labels = workload("env")["spec"]["template"]["metadata"]["labels"]
    specs = [m["spec"] for m in MANIFESTS if m["kind"] == "NetworkPolicy" and selects(m["spec"]["podSelector"], labels)]
    assert any("Egress" in spec["policyTypes"] for spec in specs)
    assert not any(spec.get("egress") for spec in specs)


def test_no_secret_is_in_the_manifests() -> None:
    assert not [manifest for manifest in MANIFESTS if manifest["kind"] == "Secret"]
    assert not KUSTOMIZATION.get("secretGenerator")


def test_kustomize_renders_them() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl; the manifests themselves are checked above")
    rendered = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    manifests = list(yaml.safe_load_all(rendered))
    assert len(manifests) == len(MANIFESTS)
    for manifest in manifests:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        assert manifest["metadata"]["labels"]["app.kubernetes.io/part-of"] == "mulligan"
    images = {word for word in rendered.split() if word.startswith("mulligan/")}
    assert images == {f"mulligan/{name}:latest" for name in SETTINGS}


def commands_of_tokens(text: str) -> list[str]:
    """From the folder that they make to its end, without comments."""
    lines = [line.partition(" # ")[0].rstrip().removeprefix("#   ") for line in text.splitlines()]
    start = next(index for index, line in enumerate(lines) if re.match(r"folder=\$\(mktemp -d\)", line))
    return lines[start : lines.index('rm -r "$folder"') + 1]


KUBECTL = """#!/bin/sh
echo "$*" >> "$SEEN/flags"
folder=$(echo "$*" | sed 's/.*--from-file=//')
cp -rp "$folder" "$SEEN/$4"
"""


def test_tokens_are_made_in_private_files_and_in_no_flag(tmp_path: Path) -> None:
    """Others see flags. The documented commands, with a kubectl that keeps what it is given."""
    commands = commands_of_tokens(DOCS)
    assert commands == commands_of_tokens((FOLDER / "kustomization.yaml").read_text())
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o700)
    (tmp_path / "tmp").mkdir()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SEEN": str(tmp_path), "TMPDIR": str(tmp_path / "tmp")}
    subprocess.run(["sh", "-euc", "umask 022\n" + "\n".join(commands)], env=environment, check=True)
    files = [tmp_path / name / role for name in ("mulligan", "mulligan-env") for role in AccessRole]
    tokens = {file.read_text().strip() for file in files}
    assert len(tokens) == len(files) == 8 and min(map(len, tokens)) == 64
    assert all(file.stat().st_mode & 0o077 == 0 and file.parent.stat().st_mode & 0o077 == 0 for file in files)
    flags = (tmp_path / "flags").read_text()
    assert flags.count("create secret generic") == 2 and not [token for token in tokens if token in flags]
    assert list((tmp_path / "tmp").iterdir()) == []
