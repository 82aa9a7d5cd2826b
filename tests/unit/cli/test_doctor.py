"""What `mulligan doctor` judges, without services."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import tempfile
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mulligan.cli.app import app
from mulligan.cli.doctor import disks, installed, sources
from mulligan.cli.doctor.certificates import check_key_files, has_name, judge_dates
from mulligan.cli.doctor.clocks import judge_clock
from mulligan.cli.doctor.finding import Diagnosis, Examination, Finding, Topic, blocking, examine
from mulligan.cli.doctor.proxied import check_proxies, is_exempt
from mulligan.cli.train import read_settings
from mulligan.common.devices import TorchDevices
from mulligan.models.catalog import CATALOG
from tests.support.small_disk import SmallDisk

TOPIC = Topic("check", "subject")
NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("begins", "ends", "verdict", "said"),
    [
        (-100, 265, Diagnosis.OK, "good until 2027-01-21"),
        (-300, 13, Diagnosis.WARNING, "expires soon, at 2026-05-14"),
        (-1, 3, Diagnosis.OK, "good until"),  # short-lived, and renewed in time
        (-9, 1, Diagnosis.WARNING, "expires soon"),
        (-100, 0, Diagnosis.PROBLEM, "expired at 2026-05-01 12:00 UTC"),
        (-100, -1, Diagnosis.PROBLEM, "expired at 2026-04-30"),
        (1, 100, Diagnosis.PROBLEM, "good from 2026-05-02 12:00 UTC, and the clock here says 2026-05-01"),
    ],
)
def test_dates_of_certificates(begins: int, ends: int, verdict: Diagnosis, said: str) -> None:
    found = judge_dates(TOPIC, NOW + begins * DAY, NOW + ends * DAY, NOW)
    assert (found.verdict, bool(found.remedy)) == (verdict, verdict is not Diagnosis.OK) and said in found.said


@pytest.mark.parametrize(
    ("names", "name", "has"),
    [
        (["env", "localhost"], "ENV", True),
        (["env"], "policy", False),
        (["*.example.com"], "a.example.com", True),
        (["*.example.com"], "a.b.example.com", False),
        (["*.example.com"], "example.com", False),
        (["127.0.0.1"], "127.0.0.1", True),
        (["::1"], "[::1]", True),
        (["127.0.0.1"], "127.0.0.2", False),
        (["*"], "localhost", False),
    ],
)
def test_names_of_certificates(names: list[str], name: str, has: bool) -> None:
    assert has_name(names, name) is has


@pytest.mark.parametrize(("mode", "verdict"), [(0o600, "ok"), (0o640, "ok"), (0o644, "problem"), (0o660, "problem")])
def test_others_must_not_read_keys(tmp_path: Path, mode: int, verdict: str) -> None:
    key = tmp_path / "tls.key"
    key.touch()
    key.chmod(mode)
    (found,) = check_key_files([key, key])
    assert found.verdict == verdict and str(key) in found.said


@pytest.mark.parametrize(
    ("host", "listed", "exempt"),
    [
        ("127.0.0.1", "localhost,127.0.0.1", True),
        ("127.0.0.1", "localhost", False),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "11.0.0.0/8", False),
        ("env.example.com", ".example.com", True),
        ("env.example.com", "*.example.com", True),
        ("env.example.com", "example.com", True),
        ("badexample.com", "example.com", False),
        ("env.example.com", "*", True),
        ("env.example.com", "", False),
        ("env.example.com", " , ", False),
    ],
)
def test_no_proxy(host: str, listed: str, exempt: bool) -> None:
    assert is_exempt(host, {"no_proxy": listed}) is exempt


def test_a_proxy_that_would_catch_services_is_named_without_its_credentials() -> None:
    addresses = {"env": "127.0.0.1:1", "policy": "policy.example.com:2", "memory": "127.0.0.1:3", "trainer": "[::1]:4"}
    proxy = {"HTTPS_PROXY": "http://me:secret@proxy:1", "no_proxy": "::1"}
    local, remote, exempt = check_proxies(addresses, proxy)
    assert local.subject == "env, memory" and local.verdict == "warning" and "no_proxy lacks 127.0.0.1" in local.said
    assert remote.verdict == "warning" and "policy.example.com go through the proxy of HTTPS_PROXY" in remote.said
    assert exempt.verdict == "ok"
    assert "secret" not in str((local, remote, exempt))
    assert [one.verdict for one in check_proxies(addresses, {"no_proxy": "x", "http_proxy": ""})] == ["ok"]


@pytest.mark.parametrize(
    ("host", "ahead", "verdict", "said"),
    [
        ("127.0.0.1", -10, "ok", "same clock"),
        ("127.0.0.1", 7200, "warning", "set back: a record of the service is 2 h ahead"),
        ("10.0.0.7", 90, "warning", "clock of 10.0.0.7 is at least 90 s ahead"),
        ("10.0.0.7", 4, "skipped", "No answer"),
    ],
)
def test_clocks(host: str, ahead: int, verdict: str, said: str) -> None:
    found = judge_clock(TOPIC, host, [NOW - DAY, NOW + timedelta(seconds=ahead)], NOW)
    assert found.verdict == verdict and said in found.said


@pytest.mark.parametrize(
    ("installed_", "pin", "needed", "verdict", "said"),
    [
        ("1.85.1", "1.85.1", ">=1.80", "ok", ""),
        ("1.90.0", "1.85.1", ">=1.80", "warning", "the tests run with 1.85.1"),
        ("1.70.0", "1.85.1", ">=1.80", "problem", "Mulligan needs >=1.80"),
        ("8.0.0", "", ">=7.35.1,<8", "problem", "Mulligan needs <8,>=7.35.1"),
        ("2.13.0+cpu", "2.13.0", ">=2.6", "ok", ""),
        ("1.90.0", "", ">=1.80", "ok", ""),
        ("nonsense", "1.0", ">=1", "warning", "which is none"),
    ],
)
def test_versions(installed_: str, pin: str, needed: str, verdict: str, said: str) -> None:
    pins = {"p": pin} if pin else {}
    (found,) = installed.judge_packages({"p": installed_}, pins, [f"p{needed}", "mulligan[x]; extra == 'y'"])
    assert found.verdict == verdict and said in found.said


def test_pins_are_read_from_the_checkout(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text("# said\nGrpcio==1.2.3  # why\ntorch==2.0; sys_platform == 'linux'\nnumpy>=2\n")
    assert installed.pinned_versions(file) == {"grpcio": "1.2.3", "torch": "2.0"}
    assert "grpcio" in installed.pinned_versions() and installed.pinned_versions(tmp_path / "none") == {}


def test_missing_extras_are_named_with_what_needs_them() -> None:
    configs: dict[str, dict[str, Any]] = {
        "policy": {"backend": "fast", "policies": {"b": {"backend": "slow"}}},
        "env": {"environments": {"game": {"kind": "odd_games"}}},
    }
    wanted = installed.wanted_extras(configs, {"optimizer": {"moments": "8bit"}})
    assert {"fast", "slow", "odd-games", "adam8bit", "trainer"} <= set(wanted)
    required = [
        "pydantic>=2",
        'no-such-thing>=1; extra == "fast"',
        'pydantic>=2; extra == "slow"',
        'mulligan[fast]; extra == "odd-games"',
        'mulligan[odd-games]; extra == "fast"',
    ]
    up = installed.check_extras({"env": wanted["env"]}, ['no-such-thing; extra == "env"'])
    assert [one.verdict for one in up] == ["warning"]
    found = {one.subject: one for one in installed.check_extras(wanted, required)}
    assert {name: str(one.verdict) for name, one in found.items()} == {
        "fast": "problem",
        "slow": "ok",
        "odd-games": "problem",
    }
    assert "backend = 'fast' needs the extra 'fast', and no-such-thing" in found["fast"].said
    assert "[fast]" in found["fast"].remedy


@pytest.mark.parametrize(
    ("device", "built", "gpus", "verdict"),
    [
        ("cuda", None, 0, "built without CUDA"),
        ("cuda", "12", 0, "torch 2 sees none"),
        ("cuda:1", "12", 1, "torch sees 1 GPU, the last of which is cuda:0"),
        ("cuda:2", "12", 2, "torch sees 2 GPUs, the last of which is cuda:1"),
        ("cuda:x", "12", 1, "no such device 'cuda:x': expected cpu, cuda or cuda:NUMBER; did you mean 'cuda'?"),
        ("tpu", None, 0, "no such device 'tpu'"),
        ("cuda:0", "12", 1, ""),
    ],
)
def test_gpus(device: str, built: str | None, gpus: int, verdict: str) -> None:
    seen = {"version": "2", "built": built, "gpus": [{"name": "A GPU", "free": 1e9}] * gpus}
    found = installed.judge_gpu(TOPIC, device, seen)
    assert (found.verdict == "problem") is bool(verdict) and verdict in found.said
    refused = TorchDevices("2", built is not None, gpus).problem(device, others=True)
    assert not refused or found.said.removesuffix(".") in f"The setting device: {refused}", "as a service says it"
    assert ("Look at nvidia-smi" in found.remedy) is ("sees none" in verdict)
    assert installed.devices({"policy": {"policies": {"a": {"engine": {"device": device}}}}}) == {"policy": device}


@pytest.mark.parametrize("room", [0, 10_000])
def test_a_full_disk_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, room: int) -> None:
    disk = SmallDisk(monkeypatch, room)
    found = disks.check_folder(TOPIC, tmp_path / "not" / "there")
    assert disk.refused and found.verdict == "problem" and f"disk of {tmp_path}/not/there is full" in found.said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "needed", "verdict"),
    [(50 * 10**6, 0, "problem"), (10**9, 0, "warning"), (10**10, 0, "ok"), (10**10, 10**11, "problem")],
)
def test_little_room(free: int, needed: int, verdict: str) -> None:
    assert disks.judge_room(TOPIC, Path("runs"), free, needed).verdict == verdict


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for root, who may write to every folder of a test."""

    def refused(*, dir: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    found = disks.check_folder(TOPIC, tmp_path)
    assert found.verdict == "problem" and found.said == f"Nothing can be written to {tmp_path}: Permission denied."


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4000 kB\nMemAvailable: 2000 kB\n")
    assert disks.available_memory(tmp_path, meminfo) == 2000 * 1024
    (tmp_path / "memory.current").write_text("300\n")
    for limit, expected in (("max", 2000 * 1024), ("1000", 700), ("200", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert disks.available_memory(tmp_path, meminfo) == expected
    assert disks.available_memory(tmp_path, tmp_path / "none") is None


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sources.check_source("embedded").verdict == "ok"
    assert sources.check_source("a/hub-id").verdict == "skipped"
    near = sources.check_source("embeded")
    assert near.verdict == "problem" and "did you mean 'embedded'" in near.said
    (tmp_path / "empty").mkdir()
    assert "the folder is empty" in sources.check_source(str(tmp_path / "empty")).said
    assert {one.verdict for one in sources.check_fetched()} == {Diagnosis.SKIPPED}
    name = next(iter(CATALOG))
    (tmp_path / "mulligan" / "models" / name).mkdir(parents=True)
    (damaged,) = [one for one in sources.check_fetched() if one.subject == name]
    assert damaged.verdict == "problem" and f"mulligan models fetch {name}" in damaged.remedy


@pytest.mark.parametrize("on_gpu", [False, True])
def test_whether_training_fits(on_gpu: bool) -> None:
    settings = read_settings(Path("frozenlake-3x3"), [])
    found = [sources.check_fit(settings, free, on_gpu=on_gpu) for free in (10**6, 10**11, None)]
    assert [one.verdict for one in found] == ["warning", "ok", "skipped"]
    assert f"on the {'GPU' if on_gpu else 'CPU'}, and 1 MB are free" in found[0].said
    unknown = read_settings(Path("frozenlake-3x3"), ["model.source=no/such-model"])
    assert sources.check_fit(unknown, 10**11).verdict == "skipped"


async def test_training_is_compared_with_the_gpu_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def seen(seconds: float) -> dict[str, Any]:
        return {"version": "2", "built": "12", "gpus": [{"name": "A", "free": 1.0}, {"name": "B", "free": 2e9}]}

    monkeypatch.setattr(installed, "ask_torch", seen)
    told = await installed.check_gpu({"trainer": "cuda:1"}, 1.0, lambda free: TOPIC.ok(f"{free:g}"))
    assert [one.said for one in told] == ["torch sees B, with 2 GB free.", "2e+09"]
    (lost,) = await installed.check_gpu({"trainer": "cuda:2"}, 1.0, lambda free: TOPIC.ok("never"))
    assert lost.verdict == "problem"


@pytest.mark.parametrize(
    ("config", "verdicts", "said"),
    [
        ({"device": "cuda", "learner_processes": 2}, ["ok", "ok"], "torch sees 2 GPUs, enough for"),
        (
            {"device": "cuda", "learner_processes": 3},
            ["ok", "problem"],
            "learner_processes: 3 processes need a GPU each, and torch sees 2 GPUs on this machine: expected at most 2",
        ),
        ({"device": "cuda"}, ["ok"], "torch sees A"),
        ({"device": "mps", "learner_processes": 3}, ["problem"], "no such device 'mps'"),
    ],
)
async def test_each_process_of_the_learner_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], verdicts: list[str], said: str
) -> None:
    async def seen(seconds: float) -> dict[str, Any]:
        gpus = [{"name": name, "free": 1e9} for name in "AB"]
        return {"version": "2", "built": "12", "other": "mps", "gpus": gpus}

    monkeypatch.setattr(installed, "ask_torch", seen)
    configs = {"trainer": config}
    processes = installed.learner_processes(configs)
    found = await installed.check_gpu(installed.devices(configs), 1.0, None, processes)
    assert [one.verdict for one in found] == verdicts and said in found[-1].said


def test_other_accelerators_will_do_for_a_policy() -> None:
    seen: dict[str, Any] = {"version": "2", "built": None, "other": "mps", "gpus": []}
    assert installed.judge_gpu(Topic("gpu", "policy"), "mps", seen).verdict == "ok"
    assert installed.devices({"policy": {"device": "auto"}, "trainer": {"device": "cpu"}}) == {}


async def test_torch_that_is_slow_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    for program, verdict, said in (
        ("import time; time.sleep(60)", "warning", "not imported within 2 s"),
        ("raise ImportError('no such library')", "problem", "ImportError: no such library"),
    ):
        monkeypatch.setattr(installed, "_TORCH", program)
        async with asyncio.timeout(30):
            (found,) = await installed.check_gpu({"trainer": "cuda"}, 2.0 if verdict == "warning" else 25.0)
        assert found.verdict == verdict and said in found.said


def test_a_model_in_the_settings_of_the_policy_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = tmp_path / "up.toml"
    config.write_text('[policy]\nmodel = "./away"\n[policy.policies.b]\nbackend = "openai"\nmodel = "./elsewhere"\n')
    result = CliRunner().invoke(app, ["doctor", "--json", "--config", str(config), "--folder", str(tmp_path)])
    found = {one["subject"]: one for one in json.loads(result.stdout)["findings"] if one["check"] == "model"}
    assert found["./away"]["verdict"] == "problem" and "no such folder" in found["./away"]["said"]
    assert "./elsewhere" not in found and result.exit_code == 1


async def test_a_check_that_hangs_or_fails_costs_its_own_finding() -> None:
    hangs = threading.Event()

    def hang() -> list[Finding]:
        hangs.wait()
        return []

    def breaks() -> list[Finding]:
        raise KeyError("planted")

    async def fine() -> list[Finding]:
        return [TOPIC.ok("fine")]

    async with asyncio.timeout(20):
        found = await examine(
            [blocking(TOPIC, hang, 0.1), blocking(TOPIC, breaks, 10.0), Examination(TOPIC, fine, 10.0)]
        )
    hangs.set()
    assert [one.verdict for one in found] == ["warning", "warning", "ok"]
    assert "did not end within 0.1 s" in found[0].said and "KeyError: 'planted'" in found[1].said


def test_wrong_arguments(tmp_path: Path) -> None:
    config = tmp_path / "up.toml"
    config.write_text("[polcy]\n[env]\n")
    result = CliRunner().invoke(app, ["doctor", "--config", str(config)])
    assert result.exit_code == 2 and "did you mean 'policy'" in result.stderr
    config.write_text("port = 1\n")
    result = CliRunner().invoke(app, ["doctor", "--config", str(config)])
    assert result.exit_code == 2 and "expected one of the tables [env]" in result.stderr
    result = CliRunner().invoke(app, ["doctor", "--recipe", "frozenlake-3x4"])
    assert result.exit_code == 2 and "did you mean 'frozenlake-3x3'" in result.stderr


def test_the_report_is_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What data say never acts as a control sequence, and a bad address is a finding among the others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["doctor", "--env", "no\x1b[31mport", "--model", "embedded", "--folder", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["ok"] is False and "\x1b" not in result.stdout
    (env,) = [one for one in report["findings"] if (one["check"], one["subject"]) == ("address", "env")]
    assert env["verdict"] == "problem" and "expected host:port" in env["said"] and "--env" in env["remedy"]
    assert [one["verdict"] for one in report["findings"] if one["subject"] == "embedded"] == ["ok"]
    plain = CliRunner().invoke(app, arguments)
    assert plain.exit_code == 1 and "\x1b" not in plain.stdout and "problem  address env: " in plain.stdout
