"""What is installed: Python, packages in tested versions, extras that the settings need; GPUs that torch sees."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

import mulligan
from mulligan.cli.doctor.finding import Finding, Topic
from mulligan.common.devices import TorchDevices, counted, parse_device
from mulligan.common.extras import how_to_install

_OLDEST = (3, 11)
COMPARED = ("grpcio", "protobuf", "pydantic", "torch", "transformers", "peft", "safetensors", "tokenizers")
_SERVICES = ("env", "policy", "memory", "trainer")
_UP = "`mulligan up`"
_ANYWHERE = ("", "auto", "cpu")  # devices that every machine has
_TORCH = (
    "import json, torch; from mulligan.common.devices import TorchDevices; seen = TorchDevices.seen_by(torch);"
    "print(json.dumps({'version': seen.version, 'built': seen.built_for_gpus, 'other': seen.other, 'gpus': [dict("
    "name=torch.cuda.get_device_name(one), free=torch.cuda.mem_get_info(one)[0]) for one in range(seen.gpus)]}))"
)


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Finding:
    topic = Topic("version", "python")
    text = ".".join(map(str, version))
    if version < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        return topic.problem(f"Python {text} is too old.", f"Make a virtual environment with Python {wanted} or newer.")
    return topic.ok(f"Python {text}.")


def installed_versions(names: Iterable[str] = COMPARED) -> dict[str, str]:
    """Without those that are not installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def pinned_versions(file: Path | None = None) -> dict[str, str]:
    """Of constraints.txt in a checkout; empty if there is none, as with a wheel."""
    file = file or Path(mulligan.__file__).resolve().parents[1] / "constraints.txt"
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    pins = (line.partition("#")[0].split(";")[0].strip().partition("==") for line in lines)
    return {name.lower(): version for name, equal, version in pins if equal}


def required_versions() -> list[str]:
    """What this distribution requires, with its extras."""
    try:
        return metadata.requires("mulligan") or []
    except metadata.PackageNotFoundError:
        return []


def judge_packages(installed: Mapping[str, str], pinned: Mapping[str, str], required: Iterable[str]) -> list[Finding]:
    """A version out of the range is a problem, one that was not tested a warning."""
    ranges: dict[str, list[Requirement]] = {}
    for text in required:
        try:
            one = Requirement(text)
        except InvalidRequirement:
            continue
        ranges.setdefault(one.name.lower(), []).append(one)
    return [
        _judge_package(Topic("version", name), version, pinned.get(name, ""), ranges.get(name, []))
        for name, version in installed.items()
    ]


def _judge_package(topic: Topic, version: str, pin: str, ranges: Iterable[Requirement]) -> Finding:
    name = topic.subject
    try:
        public = Version(version).public  # builds of torch are 2.9.0+cpu
    except InvalidVersion:
        return topic.warning(f"{name} has the version {version!r}, which is none.", f"Install {name} again.")
    install = f"Run `pip install '{name}=={pin}'`, or `make install` in a checkout." if pin else ""
    for one in ranges:
        if not one.specifier.contains(public, prereleases=True):
            said = f"{name} {version} is installed, and Mulligan needs {one.specifier}."
            return topic.problem(said, install or f"Run `pip install '{name}{one.specifier}'`.")
    if pin and public != pin:
        return topic.warning(f"{name} {version} is installed; the tests run with {pin}.", install)
    return topic.ok(f"{name} {version}.")


def wanted_extras(configs: Mapping[str, Mapping[str, Any]], recipe: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The extras that the settings need, and what needs them. A backend or an environment that has an extra of its own
    has its name."""
    found = dict.fromkeys(_SERVICES, _UP)
    for config in configs.values():
        policies = config.get("policies")
        environments = config.get("environments")
        for table in (config, *_tables(policies)):
            if isinstance(table.get("backend"), str):
                found.setdefault(table["backend"], f"backend = {table['backend']!r}")
        for table in _tables(environments):
            kind = table.get("kind")
            if isinstance(kind, str):
                found.setdefault(kind.replace("_", "-"), f"kind = {kind!r}")
    optimizer = (recipe or {}).get("optimizer")
    if isinstance(optimizer, Mapping) and optimizer.get("moments") == "8bit":
        found["adam8bit"] = 'optimizer.moments = "8bit"'
    return found


def _tables(table: Any) -> list[Mapping[str, Any]]:
    return [one for one in table.values() if isinstance(one, Mapping)] if isinstance(table, Mapping) else []


def check_extras(wanted: Mapping[str, str], required: Iterable[str]) -> list[Finding]:
    """Extras of which packages are missing. `required` is what the distribution requires, with markers."""
    known = list(required)
    if not known:
        said = "Mulligan is not installed as a package here, so its extras are not known."
        return [Topic("extra", "mulligan").skipped(said)]
    found = []
    for extra, whose in wanted.items():
        names = _packages_of(extra, known)
        missing = [name for name in names if not installed_versions([name])]
        topic = Topic("extra", extra)
        if missing:
            said = f"{whose} needs the extra {extra!r}, and {', '.join(missing)} of it are not installed."
            remedy = f"Install it: {how_to_install(extra)}."
            # A machine that runs one of the services, or none, does without the others' packages.
            found.append(topic.warning(said, remedy) if whose == _UP else topic.problem(said, remedy))
        elif names:
            found.append(topic.ok(f"All packages of the extra {extra!r} are installed."))
    return found


def _packages_of(extra: str, required: Iterable[str], seen: frozenset[str] = frozenset()) -> list[str]:
    """Distributions that an extra needs on this platform, also those of extras that it names."""
    found: dict[str, None] = {}
    for text in required:
        try:
            one = Requirement(text)
        except InvalidRequirement:
            continue
        plain = one.marker is None or one.marker.evaluate({"extra": ""})
        if plain or not (one.marker and one.marker.evaluate({"extra": extra})):
            continue
        if re.sub(r"[-_.]+", "-", one.name).lower() == "mulligan":
            for other in one.extras - seen:
                found |= dict.fromkeys(_packages_of(other, required, seen | {extra, other}))
        else:
            found[one.name] = None
    return list(found)


def devices(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The settings of services that name a device other than the CPU."""
    found = {}
    for service, config in configs.items():
        left: list[Mapping[str, Any]] = [config]
        while left:
            table = left.pop()
            device = table.get("device")
            if isinstance(device, str) and device not in _ANYWHERE:
                found[service] = device
            left += _tables(table)
    return found


def learner_processes(configs: Mapping[str, Mapping[str, Any]]) -> int:
    """Of the trainer on this machine."""
    count = configs.get("trainer", {}).get("learner_processes", 1)
    return count if isinstance(count, int) else 1


async def ask_torch(seconds: float) -> Any:
    """What torch says of itself and of GPUs, in a process of its own, because its import takes long. Raises
    RuntimeError."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _TORCH, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        async with asyncio.timeout(seconds):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"status {process.returncode}")
    return json.loads(output.decode().splitlines()[-1])


async def check_gpu(
    configured: Mapping[str, str],
    seconds: float,
    judge_fit: Callable[[float], Finding] | None = None,
    processes: int = 1,
) -> list[Finding]:
    """Whether torch sees the devices that the settings name, and a GPU for each of the learner's processes. `judge_fit`
    says whether training fits into the free bytes of the trainer's GPU."""
    topic = Topic("gpu", "cuda")
    if not configured:
        return [topic.skipped('No setting says device = "cuda"; give --config FILE, the file of `mulligan up`.')]
    try:
        seen = await ask_torch(seconds)
    except TimeoutError:  # an OSError, too
        said = f"torch was not imported within {seconds:g} s, so whether it sees the GPU is not known."
        return [topic.warning(said, "Run the command again when the machine does less.")]
    except (RuntimeError, OSError, ValueError) as error:
        said = f"torch cannot be asked: {error}."
        return [topic.problem(said, f"Install it: {how_to_install('trainer')}.")]
    found = [judge_gpu(Topic("gpu", service), device, seen) for service, device in configured.items()]
    number = gpu_number(configured.get("trainer", ""), len(seen["gpus"]))
    if number is not None and processes > 1:
        found.append(judge_processes(Topic("gpu", "learner"), processes, seen))
    if judge_fit is not None and number is not None:
        found.append(judge_fit(seen["gpus"][number]["free"]))
    return found


def gpu_number(device: str, count: int) -> int | None:
    """Of `cuda` and `cuda:1`; None if there is no such GPU among so many."""
    try:
        kind, number = parse_device(device)
    except ValueError:
        return None
    return number if kind == "cuda" and number < count else None


def judge_gpu(topic: Topic, device: str, seen: Mapping[str, Any]) -> Finding:
    """Of a service's setting `device`, where torch said what it sees."""
    # A learner computes on CPUs and on GPUs of CUDA alone.
    problem, remedy = _devices(seen).examined(device, others=topic.subject != "trainer")
    if problem:
        remedy = f"{remedy[0].upper()}{remedy[1:]}." if remedy else "Correct the setting `device`."
        return topic.problem(f"The setting device: {problem}.", remedy)
    number = gpu_number(device, len(seen["gpus"]))
    if number is None:
        return topic.ok(f"torch has the device {device}.")
    gpu = seen["gpus"][number]
    return topic.ok(f"torch sees {gpu['name']}, with {gpu['free'] / 1e9:.0f} GB free.")


def judge_processes(topic: Topic, processes: int, seen: Mapping[str, Any]) -> Finding:
    devices = _devices(seen)
    if problem := devices.lacks_for(processes):
        return topic.problem(f"The setting learner_processes: {problem}.", "Correct the setting `learner_processes`.")
    return topic.ok(f"torch sees {counted(devices.gpus)}, enough for learner_processes = {processes}.")


def _devices(seen: Mapping[str, Any]) -> TorchDevices:
    return TorchDevices(seen["version"], bool(seen["built"]), len(seen["gpus"]), seen.get("other") or "")
