"""The trainer looks for its GPUs before it starts a process or serves."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Any

import pytest

from mulligan.common.devices import TorchDevices
from mulligan.trainer import __main__ as trainer
from mulligan.trainer.config import TrainerSettings
from mulligan.trainer.learner.devices import device_problem
from mulligan.trainer.learner.ranks import Ranks


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def see(monkeypatch: pytest.MonkeyPatch, gpus: int, *, built: bool = True) -> None:
    monkeypatch.setattr(TorchDevices, "seen_by", lambda torch: TorchDevices("2.9", built, gpus))


def started(monkeypatch: pytest.MonkeyPatch, *flags: str) -> list[Any]:
    """What the trainer starts with these flags: torchrun for so many processes, or a service. Raises SystemExit."""
    found: list[Any] = []

    def launch(module: str, arguments: list[str], processes: int, drain_seconds: float) -> None:
        found.append(processes)
        raise InterruptedError  # launch() does not come back

    monkeypatch.setattr(sys, "argv", ["trainer", *flags])
    monkeypatch.setattr(trainer, "launch", launch)
    monkeypatch.setattr(trainer, "run", lambda settings, serve: found.append("serves"))
    monkeypatch.setattr(trainer, "_join", lambda settings: Ranks())
    monkeypatch.setattr(trainer, "return_freed_memory", lambda: None)
    with suppress(InterruptedError):
        trainer.main()
    return found


@pytest.mark.parametrize(
    ("flags", "gpus", "said"),
    [
        ("--device cuda", 0, "device: 'cuda' needs a GPU, and torch 2.9 sees none"),
        ("--device cuda --learner-processes 2", 0, "device: 'cuda' needs a GPU, and torch 2.9 sees none"),
        ("--device cuda:1", 1, "device: no such device 'cuda:1': torch sees 1 GPU"),
        ("--device tpu", 1, "device: no such device 'tpu': expected cpu, cuda or cuda:NUMBER"),
        ("--device mps --learner-processes 2", 1, "device: no such device 'mps': expected"),
        (
            "--device cuda --learner-processes 3",
            2,
            "learner_processes: 3 processes need a GPU each, and torch sees 2 GPUs on this machine: expected at most 2",
        ),
    ],
)
def test_what_is_not_there_is_refused_by_its_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, gpus: int, said: str
) -> None:
    see(monkeypatch, gpus)
    with pytest.raises(SystemExit) as ended:
        started(monkeypatch, *flags.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"trainer: bad settings\n  {said}")


@pytest.mark.parametrize(
    ("flags", "gpus", "expected"),
    [
        ("", 0, "serves"),
        ("--learner-processes 3", 0, 3),
        ("--device cuda --learner-processes 2", 2, 2),
        ("--device cuda:1", 2, "serves"),
    ],
)
def test_what_is_there_starts(monkeypatch: pytest.MonkeyPatch, flags: str, gpus: int, expected: Any) -> None:
    see(monkeypatch, gpus)
    assert started(monkeypatch, *flags.split()) == [expected]


@pytest.mark.parametrize("flags", ["--device cuda", "--no-such-flag"])
def test_under_torchrun_a_refusal_ends_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    see(monkeypatch, 3)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    ended: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "getppid", lambda: 1234)
    monkeypatch.setattr(os, "kill", lambda *arguments: ended.append(arguments))
    with pytest.raises(SystemExit):
        started(monkeypatch, *flags.split())
    assert ended == [(1234, signal.SIGTERM)]
    if flags == "--device cuda":
        assert "--nproc-per-node: 4 processes need a GPU each, and torch sees 3" in capsys.readouterr().err
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # other machines have the rest of them
        assert started(monkeypatch, "--device", "cuda", "--learner-processes", "9") == ["serves"]
        assert len(ended) == 1


def test_torch_itself_is_asked() -> None:
    """Whatever this machine has."""
    assert device_problem("cpu", 100) == ""
    assert "device: no such device 'cuda:999'" in (told := device_problem("cuda:999", 1)) or "needs a GPU" in told


def test_torchruns_whose_processes_would_not_find_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    settings = TrainerSettings.load([])
    with pytest.raises(SystemExit):
        trainer._join(settings)
    said = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE: expected 1 in the environment of each of the 2 torchrun"
    assert said in capsys.readouterr().err
