"""What users import: every name is there, typed, and brings nothing heavy before it is used."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import mulligan
from tests.support.imports import modules_after

PACKAGES = ("mulligan", *(f"mulligan.{name}" for name in ("env", "policy", "memory", "trainer", "conformance")))
HEAVY = ("torch", "transformers", "grpc", "google", "pydantic", "numpy")


def offered(package: str) -> dict[str, str]:
    """Names of the package's `.pyi`, and the module that each comes from."""
    stub = Path(importlib.import_module(package).__file__ or "").with_suffix(".pyi")
    imports = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: f"{package}.{node.module}" for node in imports for alias in node.names}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_there_and_is_the_one_of_its_module(package: str) -> None:
    module = importlib.import_module(package)
    names = offered(package)
    assert names
    assert sorted(module.__all__) == sorted(names) == sorted(dir(module))
    for name, source in names.items():
        assert getattr(module, name) is getattr(importlib.import_module(source), name)


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_it_brings_nothing_heavy(package: str) -> None:
    loaded = modules_after(f"import {package}")
    assert package in loaded
    assert [name for name in loaded if name.split(".")[0] in HEAVY] == []


def test_what_an_author_writes_brings_neither_grpc_nor_torch() -> None:
    loaded = modules_after("from mulligan.env import Environment, StepResult, generic_prompts, read_settings")
    assert "mulligan.env.base" in loaded
    assert [name for name in loaded if name.split(".")[0] in ("torch", "grpc", "google")] == []


def test_a_wrong_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="Enviroment"):
        mulligan.Enviroment  # type: ignore[attr-defined]  # noqa: B018
