"""What tests need and may not find here: Docker, SGLang, vLLM. Where it is missing they are skipped and say so; where
it must be there, they fail.

MULLIGAN_TEST_SGLANG is the address of a server of the embedded model with LoRA, MULLIGAN_TEST_SGLANG_PYTHON the
interpreter that launches further ones; MULLIGAN_TEST_VLLM_PYTHON is the interpreter that has vLLM. Continuous
integration sets MULLIGAN_TEST_SGLANG_REQUIRED and MULLIGAN_TEST_DOCKER_REQUIRED once it has started them; the same for
vLLM is MULLIGAN_TEST_VLLM_REQUIRED.
"""

from __future__ import annotations

import os

import pytest


def sglang_variable(name: str) -> str:
    """Of the environment. Skips the test, or fails it, where it is not set."""
    value = os.environ.get(name, "")
    require("" if value else f"{name} is not set: no SGLang to test with", "MULLIGAN_TEST_SGLANG_REQUIRED")
    return value


def require_docker(problem: str) -> None:
    """Goes on where `problem` is empty."""
    require(problem, "MULLIGAN_TEST_DOCKER_REQUIRED")


def require(problem: str, variable: str) -> None:
    """Skips the test where there is a problem, or fails it where the variable is set."""
    if problem:
        (pytest.fail if os.environ.get(variable) else pytest.skip)(problem)
