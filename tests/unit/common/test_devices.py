from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mulligan.common.devices import TorchDevices, parse_device


@pytest.mark.parametrize(
    ("name", "expected"), [("cpu", ("cpu", 0)), ("cuda", ("cuda", 0)), ("cuda:12", ("cuda", 12)), ("cpu:0", ("cpu", 0))]
)
def test_names_of_devices(name: str, expected: tuple[str, int]) -> None:
    assert parse_device(name) == expected


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("cdua:1", "cuda"),
        ("CUDA", "cuda"),
        ("gpu", "cuda"),
        ("GPU:0", "cuda"),
        ("cuda:x", "cuda"),
        ("cuda:", "cuda"),
        ("cuda:²", "cuda"),
        ("cuda:99999", "cuda"),
        (" cuda", "cuda"),
        ("cpuu", "cpu"),
        ("vulkan", ""),
        ("mps", ""),
        ("", ""),
    ],
)
def test_other_names_are_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match="no such device") as caught:
        parse_device(name)
    expected = f"no such device {name!r}: expected cpu, cuda or cuda:NUMBER"
    assert str(caught.value) == expected + (f"; did you mean {near!r}?" if near else "")


def test_control_characters_and_length_of_a_name() -> None:
    with pytest.raises(ValueError, match="no such device") as caught:
        parse_device("\x1b[31m" + "x" * 10_000)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 300


def torch_with(gpus: int = 0, cuda: str | None = None, hip: str | None = None, accelerator: str = "") -> Any:
    """The module as far as it is asked. torch counts GPUs also where it cannot use them."""
    found = accelerator or ("cuda" if gpus else "")
    return SimpleNamespace(
        __version__="2.9",
        version=SimpleNamespace(cuda=cuda, hip=hip),
        cuda=SimpleNamespace(is_available=lambda: gpus > 0, device_count=lambda: gpus),
        accelerator=SimpleNamespace(
            is_available=lambda: bool(found), current_accelerator=lambda: SimpleNamespace(type=found)
        ),
    )


@pytest.mark.parametrize(
    ("torch", "device", "problem"),
    [
        (torch_with(), "cpu", ""),
        (torch_with(), "cuda", "'cuda' needs a GPU, and torch 2.9 was built without CUDA"),
        (torch_with(), "cuda:1", "'cuda:1' needs a GPU, and torch 2.9 was built without CUDA"),
        (torch_with(cuda="12"), "cuda", "'cuda' needs a GPU, and torch 2.9 sees none: look at nvidia-smi"),
        (torch_with(1, "12"), "cuda", ""),
        (torch_with(1, "12"), "cuda:0", ""),
        (torch_with(1, "12"), "cuda:1", "no such device 'cuda:1': torch sees 1 GPU, the last of which is cuda:0"),
        (torch_with(2, "12"), "cuda:2", "no such device 'cuda:2': torch sees 2 GPUs, the last of which is cuda:1"),
        (torch_with(2, hip="6"), "cuda:1", ""),
        (torch_with(hip="6"), "cuda", "'cuda' needs a GPU, and torch 2.9 sees none"),
        (torch_with(accelerator="mps"), "mps", "no such device 'mps': expected cpu, cuda or cuda:NUMBER"),
        (torch_with(), "tpu", "no such device 'tpu': expected cpu, cuda or cuda:NUMBER"),
    ],
)
def test_whether_torch_has_a_device(torch: Any, device: str, problem: str) -> None:
    found = TorchDevices.seen_by(torch).problem(device)
    assert found.startswith(problem) and bool(found) is bool(problem)


def test_other_accelerators_where_they_will_do() -> None:
    seen = TorchDevices.seen_by(torch_with(accelerator="mps"))
    assert seen.problem("mps", others=True) == ""
    assert "expected cpu, cuda, mps or cuda:NUMBER" in seen.problem("xpu", others=True)
    assert "expected cpu, cuda or" in TorchDevices.seen_by(torch_with()).problem("mps", others=True)
