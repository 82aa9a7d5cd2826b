"""The command `mulligan doctor`, and which checks it runs."""

from __future__ import annotations

import asyncio
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mulligan.cli.connection import DEFAULT_ADDRESSES, EnvAddress, MemoryAddress, PolicyAddress, TrainerAddress
from mulligan.cli.doctor import disks, installed, sources
from mulligan.cli.doctor.certificates import check_certificate_files, check_key_files
from mulligan.cli.doctor.finding import Diagnosis, Examination, Finding, Topic, blocking, examine
from mulligan.cli.doctor.proxied import check_proxies
from mulligan.cli.doctor.services import (
    SERVICE_SECONDS,
    ServiceReport,
    away_by_default,
    examine_service,
    flag,
    not_started,
)
from mulligan.cli.out import Heartbeat, Styled, fail, json_safe, line, note, show
from mulligan.cli.train import read_settings
from mulligan.common.addresses import Addresses
from mulligan.common.config import SERVICES, read_service_tables
from mulligan.trainer.settings import RunSettings

_SECONDS = 10.0  # for a check of this machine
_LOADS = "transformers"  # the backend that loads models itself, the default
_STYLES = {
    Diagnosis.OK: "green",
    Diagnosis.WARNING: "yellow",
    Diagnosis.PROBLEM: "bold red",
    Diagnosis.SKIPPED: "dim",
}


@dataclass(frozen=True, slots=True)
class Patient:
    """What is looked at. `configs` are the settings in files, by service."""

    addresses: Mapping[str, str]
    folder: Path
    configs: Mapping[str, Mapping[str, Any]]
    settings: RunSettings | None
    sources: Sequence[str]
    now: datetime


def doctor(
    recipe: Annotated[
        Path | None, typer.Option(help="A run's settings, as `mulligan train` takes them: a TOML file or a name.")
    ] = None,
    model: Annotated[str, typer.Option(help="A model that you want to use: hub id, folder, or a fetched one.")] = "",
    config: Annotated[
        Path | None,
        typer.Option(
            help="The file of `mulligan up --config`, a table of settings per service.", exists=True, dir_okay=False
        ),
    ] = None,
    folder: Annotated[Path, typer.Option(help="That of `mulligan up`, with runs, weights and checkpoints.")] = Path(
        "runs/local"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print all findings as one JSON object.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print what is well, too.")] = False,
    env: EnvAddress = DEFAULT_ADDRESSES["env"],
    policy: PolicyAddress = DEFAULT_ADDRESSES["policy"],
    memory: MemoryAddress = DEFAULT_ADDRESSES["memory"],
    trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"],
) -> None:
    """Look at addresses, versions, certificates, proxies, clocks, disks and models; say what is wrong and what to do.
    The services need not run. Ends within 15 seconds, with status 0 if nothing is a problem, otherwise 1.

    Example: `mulligan doctor --recipe frozenlake-3x3`
    """
    settings = read_settings(recipe, []) if recipe is not None else None
    chosen = [*([model] if model else []), *([settings.model.source] if settings is not None else [])]
    patient = Patient(
        addresses={"env": env, "policy": policy, "memory": memory, "trainer": trainer},
        folder=folder,
        configs=_configs(config),
        settings=settings,
        sources=list(dict.fromkeys(chosen)),
        now=datetime.now(UTC),
    )
    with Heartbeat(lambda: "looking", every=3.0):
        findings = asyncio.run(look(patient))
    if as_json:
        _print_json(findings)
    else:
        _print(findings, verbose=verbose)
    sys.exit(1 if any(one.verdict is Diagnosis.PROBLEM for one in findings) else 0)


def _configs(file: Path | None) -> dict[str, dict[str, Any]]:
    if file is None:
        return {}
    try:
        tables = read_service_tables(file)
    except (OSError, ValueError, tomllib.TOMLDecodeError) as error:
        fail(f"--config {error}", 2)
    if not tables:
        fail(f"--config {file}: expected one of the tables {', '.join(f'[{name}]' for name in SERVICES)}", 2)
    return tables


async def look(patient: Patient) -> list[Finding]:
    """All findings. What services tell of folders and models of this machine is looked at in the end."""
    reports: dict[str, ServiceReport] = {}
    services = [_service(patient, name, reports) for name in patient.addresses]
    around = [*_installed(patient), *_files(patient), *_models(patient)]
    found, others = await asyncio.gather(examine(services), examine(around))
    if len(reports) == len(patient.addresses) and away_by_default(reports, patient.addresses):
        found = not_started(reports)
    return [*found, *others, *await examine(_told(patient, reports))]


def _service(patient: Patient, name: str, reports: dict[str, ServiceReport]) -> Examination:
    async def work() -> Sequence[Finding]:
        reports[name] = await examine_service(name, patient.addresses[name], patient.now)
        return reports[name].findings

    remedy = f"See the log of the service, the network between, and {flag(name)}."
    return Examination(Topic("address", name), work, SERVICE_SECONDS, remedy)


def _installed(patient: Patient) -> list[Examination]:
    recipe = patient.settings.model_dump(mode="json") if patient.settings is not None else None

    def packages() -> list[Finding]:
        required = installed.required_versions()
        versions = installed.judge_packages(installed.installed_versions(), installed.pinned_versions(), required)
        extras = installed.check_extras(installed.wanted_extras(patient.configs, recipe), required)
        return [installed.check_python(), *versions, *extras]

    wanted = installed.devices(patient.configs)
    processes = installed.learner_processes(patient.configs)
    settings = patient.settings
    fit = partial(sources.check_fit, settings, on_gpu=True) if settings is not None else None
    return [
        blocking(Topic("version", "packages"), packages, _SECONDS),
        Examination(Topic("version", "services"), _versions_of_services, _SECONDS),
        Examination(Topic("gpu", "cuda"), lambda: installed.check_gpu(wanted, _SECONDS - 1, fit, processes), _SECONDS),
    ]


async def _versions_of_services() -> list[Finding]:
    why = "The contracts do not say which release a service is of; one that is too old lacks calls, and says so."
    return [Topic("version", "services").skipped(why)]


def _files(patient: Patient) -> list[Examination]:
    """Proxies, disks, memory, and files of certificates and secrets that the settings name."""
    needed = sources.needed_on_disk(patient.settings)
    folders = {"runs": patient.folder, **disks.cache_folders()}
    for service, table in patient.configs.items():
        for name in ("runs_folder", "weights_folder", "state_folder"):
            if isinstance(table.get(name), str):
                folders[f"{service}.{name}"] = Path(table[name])
    found = [
        blocking(Topic("proxy", "environment"), lambda: check_proxies(patient.addresses), _SECONDS),
        blocking(Topic("memory", "machine"), lambda: [disks.check_memory(), disks.check_shared_memory()], _SECONDS),
        blocking(Topic("certificate", "files"), lambda: _named_files(patient), _SECONDS),
    ]
    return [*found, *(_disk(name, folder, needed if name == "runs" else 0) for name, folder in folders.items())]


def _disk(name: str, folder: Path, needed: int = 0) -> Examination:
    topic = Topic("disk", name)
    return blocking(topic, lambda: [disks.check_folder(topic, folder, needed)], _SECONDS)


def _named_files(patient: Patient) -> list[Finding]:
    certificates, secrets = [], []
    for table in patient.configs.values():
        for name, value in table.items():
            if not isinstance(value, str) or not value:
                continue
            if name.endswith(("tls_key", "token_file")):
                secrets.append(Path(value))
            elif name.endswith(("tls_certificate", "tls_cert", "tls_ca", "tls_client_ca")):
                certificates.append(Path(value))
    return [*check_certificate_files(certificates, patient.now), *check_key_files(secrets)]


def _models(patient: Patient) -> list[Examination]:
    found = [_source(one) for one in dict.fromkeys([*patient.sources, *_configured_models(patient)])]
    found.append(blocking(Topic("model", "fetched"), sources.check_fetched, _SECONDS))
    settings = patient.settings
    if settings is not None and "trainer" not in installed.devices(patient.configs):  # else the check of GPUs says it
        topic = Topic("memory", "training")
        found.append(blocking(topic, lambda: [sources.check_fit(settings, disks.available_memory())], _SECONDS))
    return found


def _configured_models(patient: Patient) -> list[str]:
    """Models that a policy on this machine loads; other backends may have theirs elsewhere."""
    table = patient.configs.get("policy", {})
    policies = table.get("policies")
    tables = [table, *(policies.values() if isinstance(policies, dict) else ())]
    found = [one for one in tables if isinstance(one, dict) and one.get("backend", _LOADS) == _LOADS]
    return [one["model"] for one in found if isinstance(one.get("model"), str)]


def _source(source: str) -> Examination:
    return blocking(Topic("model", source), lambda: [sources.check_source(source)], _SECONDS)


def _told(patient: Patient, reports: Mapping[str, ServiceReport]) -> list[Examination]:
    """What services on this machine told: the folders of runs, and the models of policies."""
    found = []
    for name, report in reports.items():
        if report.told.folders or report.told.models:
            if not Addresses.parse(patient.addresses[name]).loopback:
                continue
            parents = dict.fromkeys(Path(one).parent for one in report.told.folders)
            found += [_disk(f"{name} runs", folder) for folder in parents if folder != patient.folder.absolute()]
            found += [_source(one) for one in sources.local_folders(report.told.models) if one not in patient.sources]
    return [Examination(one.topic, one.work, 3.0) for one in found]


def _print_json(findings: Sequence[Finding]) -> None:
    counts = Counter(one.verdict for one in findings)
    report = {
        "ok": not counts[Diagnosis.PROBLEM],
        "counts": {str(verdict): counts[verdict] for verdict in Diagnosis},
        "findings": [asdict(one) for one in findings],
    }
    show(json_safe(json.dumps(report, indent=2, ensure_ascii=False)))


def _print(findings: Sequence[Finding], *, verbose: bool) -> None:
    counts = Counter(one.verdict for one in findings)
    for one in findings:
        if one.verdict in (Diagnosis.PROBLEM, Diagnosis.WARNING) or verbose:
            head: Styled = (f"{one.verdict:<8}", _STYLES[one.verdict])
            line(head, f" {one.check} {one.subject}: {one.said}")
            if one.remedy:
                line(f"         → {one.remedy}")
    counted = ", ".join(f"{verdict} {counts[verdict]}" for verdict in Diagnosis)
    show(f"{len(findings)} findings: {counted}")
    if not verbose:
        note("--verbose shows all checks, and why some were skipped")
