"""The benchmark at the shape of a large model, at a tiny one, and without a GPU."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from benchmarks.scale import main
from mulligan.trainer.estimate.memory import Training, memory
from mulligan.trainer.estimate.shapes import QWEN3_4B, shape_from


def result_of(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The printed lines but the last, and that one, read."""
    monkeypatch.setattr(sys, "argv", ["scale", *arguments])
    threads = torch.get_num_threads()
    main()
    torch.set_num_threads(threads)
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_without_a_gpu_it_prints_the_estimates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines, result = result_of(["--rows", "16384"], monkeypatch, capsys)
    assert lines[0] == "no CUDA device"
    batches = ["rows of 16,384", "ERL, prefixes once", "ERL, each sequence alone"]
    assert [(one["trained"], one["batch"], one["tokens_per_second"]) for one in result["ways"]] == [
        (way, batch, None) for way in ("full", "lora-16") for batch in batches
    ]
    expected = memory(shape_from(QWEN3_4B), Training(rank=16), 16_384, checkpointing=True).total / 2**30
    assert result["ways"][3]["estimated_gib"] == expected
    assert result["benchmark"] == "scale" and result["device"] is None


def test_of_several_processes_one_prints_the_estimates_for_their_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    _, result = result_of(["--rows", "16384", "--ways", "full"], monkeypatch, capsys)
    expected = memory(shape_from(QWEN3_4B), Training(), 16_384, gpus=8, checkpointing=True).total / 2**30
    assert (result["ways"][0]["gpus"], result["ways"][0]["estimated_gib"]) == (8, expected)
    monkeypatch.setenv("RANK", "1")
    main()
    assert capsys.readouterr().out == ""


def test_a_tiny_shape_is_measured_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--shape", "tiny", "--quick", "--rows", "64"]
    lines, result = result_of(arguments, monkeypatch, capsys)
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| full"] * 3 + ["| lora-16"] * 3
    for one in result["ways"]:
        assert one["tokens_per_second"] > 0 and one["gpus"] == 1 and one["note"] == ""
    assert result["ways"][0]["batch"] == "rows of 64"
