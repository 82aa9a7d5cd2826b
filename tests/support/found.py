"""What tests need and may not find here: Docker, SGLang, vLLM, PostgreSQL, strace, Chromium, a real language model.
Where it is missing they are skipped and say so; where it must be there, they fail.

MULLIGAN_TEST_SGLANG is the address of a server of the embedded model with LoRA, MULLIGAN_TEST_SGLANG_PYTHON the
interpreter that launches further ones; MULLIGAN_TEST_VLLM_PYTHON is the interpreter that has vLLM. MULLIGAN_TEST_LM is
a folder with SmolLM2-135M-Instruct; without it, the one that `mulligan models fetch smollm2-135m` filled.

Continuous integration sets MULLIGAN_TEST_NAME_REQUIRED once it has installed or started what is named: SGLANG, DOCKER,
STRACE, CHROMIUM, LM, POSTGRES, POSTGRES_IMAGE (on the Docker engine). The same for vLLM is MULLIGAN_TEST_VLLM_REQUIRED.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mulligan.models.catalog import default_folder


def sglang_variable(name: str) -> str:
    """Of the environment. Skips the test, or fails it, where it is not set."""
    value = os.environ.get(name, "")
    require("" if value else f"{name} is not set: no SGLang to test with", "MULLIGAN_TEST_SGLANG_REQUIRED")
    return value


def sglang_address() -> str:
    """Of the server that all tests share."""
    return sglang_variable("MULLIGAN_TEST_SGLANG").rstrip("/")


def language_model() -> Path:
    """A folder with SmolLM2-135M-Instruct. Skips the test, or fails it, where there is none."""
    folder = Path(os.environ.get("MULLIGAN_TEST_LM") or default_folder("smollm2-135m"))
    there = (folder / "model.safetensors").is_file()
    how = "`mulligan models fetch smollm2-135m` fetches it"
    require("" if there else f"{folder}: no language model to test with; {how}", "MULLIGAN_TEST_LM_REQUIRED")
    return folder


def require_docker(problem: str) -> None:
    """Goes on where `problem` is empty."""
    require(problem, "MULLIGAN_TEST_DOCKER_REQUIRED")


def require_postgres(problem: str) -> None:
    """Goes on where `problem` is empty."""
    require(problem, "MULLIGAN_TEST_POSTGRES_REQUIRED")


def require_strace(problem: str) -> None:
    """Goes on where `problem` is empty."""
    require(problem, "MULLIGAN_TEST_STRACE_REQUIRED")


def require_chromium(problem: str) -> None:
    """Goes on where `problem` is empty."""
    require(problem, "MULLIGAN_TEST_CHROMIUM_REQUIRED")


def require(problem: str, variable: str) -> None:
    """Skips the test where there is a problem, or fails it where the variable is set."""
    if problem:
        (pytest.fail if os.environ.get(variable) else pytest.skip)(problem)
