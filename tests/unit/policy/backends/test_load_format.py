"""No pickle is loaded: what reads the weights of a model, here or in an engine, is told to take safetensors alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from mulligan.policy.backends._servers.server import EngineServer
from mulligan.policy.backends.sglang.server import SglangServer
from mulligan.policy.backends.vllm.server import VllmServer

ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.parametrize("engine", [SglangServer, VllmServer])
@pytest.mark.parametrize("source", ["some/model", "/models/mine"])
def test_a_launched_engine_loads_safetensors_alone(engine: type[EngineServer], source: str) -> None:
    arguments = engine.launch_arguments(source, "0-original", 1, ["--other", "1"])
    place = arguments.index("--load-format")
    assert arguments[place + 1] == "safetensors" and arguments[-2:] == ["--other", "1"]
    for flags in (["--load-format", "dummy"], ["--load-format=gguf"], ["--load_format", "dummy"]):
        arguments = engine.launch_arguments(source, "0-original", 1, flags)
        assert "safetensors" not in arguments and arguments[-len(flags) :] == flags


def _loads(file: Path) -> Iterator[ast.Call]:
    """Calls that read the weights of a model: AutoModel.from_pretrained, Qwen3ForCausalLM.from_pretrained, …"""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
            name = node.func.value
            if isinstance(name, ast.Name) and (name.id.startswith("AutoModel") or "For" in name.id):
                yield node


def test_all_programs_load_models_from_safetensors_alone() -> None:
    found = 0
    for folder in ("services", "benchmarks", "proof", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            for call in _loads(file):
                found += 1
                given = {word.arg: word.value for word in call.keywords}
                value = given.get("use_safetensors")
                where = f"{file.relative_to(ROOT)}:{call.lineno}"
                assert isinstance(value, ast.Constant) and value.value is True, where
    assert found > 5, "they are called otherwise by now"
