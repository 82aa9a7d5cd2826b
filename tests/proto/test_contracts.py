"""The contracts are clean, their committed stubs are fresh, and the rules that every contract obeys are obeyed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor

from mulligan.common.buf import validate_pb2
from mulligan.common.errors import Code, DomainError, Reason
from mulligan.env.v1 import env_service_pb2
from mulligan.memory.v1 import memory_service_pb2
from mulligan.policy.v1 import policy_admin_service_pb2, policy_service_pb2
from mulligan.trainer.v1 import learner_service_pb2
from tests.support.made import buf
from tests.support.paths import ROOT

GENERATE = ROOT / "proto" / "generate.py"
CONTRACTS = sorted((ROOT / "proto" / "mulligan").rglob("*.proto"))


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)


def copy_of_the_contracts(folder: Path) -> Path:
    """The contracts, and beside them the package with their stubs."""
    ignored = shutil.ignore_patterns("__pycache__")
    for source in (*(ROOT / "services").glob("*/v1"), ROOT / "services" / "common" / "buf"):
        shutil.copytree(source, folder / source.relative_to(ROOT), ignore=ignored)
    return Path(shutil.copytree(ROOT / "proto", folder / "proto", ignore=ignored))


def test_there_are_contracts_for_each_service() -> None:
    packages = {path.parent.parent.name for path in CONTRACTS}
    assert packages == {"common", "env", "policy", "memory", "trainer"}


def test_the_committed_stubs_are_byte_for_byte_what_the_generator_writes() -> None:
    result = run(sys.executable, GENERATE, "--check")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("change", ["edited", "left over", "missing"])
def test_stale_stubs_are_noticed(tmp_path: Path, change: str) -> None:
    proto = copy_of_the_contracts(tmp_path)
    stub = min((tmp_path / "services").glob("*/v1/*_pb2.py"))
    if change == "edited":
        stub.write_text(stub.read_text() + "\n")
    elif change == "missing":
        stub.unlink()
    else:
        shutil.copyfile(stub, stub.with_name("gone_pb2.py"))
    result = run(sys.executable, proto / "generate.py", "--check")
    assert result.returncode == 1
    assert "make proto" in result.stderr


def test_generating_again_repairs_stale_stubs(tmp_path: Path) -> None:
    proto = copy_of_the_contracts(tmp_path)
    shutil.rmtree(tmp_path / "services" / "env")
    assert run(sys.executable, proto / "generate.py").returncode == 0
    assert run(sys.executable, proto / "generate.py", "--check").returncode == 0


def test_the_contracts_pass_buf_lint() -> None:
    result = run(buf(), "lint", cwd=ROOT / "proto")
    assert result.returncode == 0, result.stdout + result.stderr


def test_buf_lint_is_in_force(tmp_path: Path) -> None:
    """A contract that breaks the standard rules is reported: the configuration does look at our files."""
    proto = copy_of_the_contracts(tmp_path)
    bad = proto / "mulligan" / "env" / "v1" / "bad.proto"
    bad.write_text('syntax = "proto3";\npackage mulligan.wrong.v1;\nmessage lower_case { string CamelCase = 1; }\n')
    result = run(buf(), "lint", cwd=proto)
    assert result.returncode != 0
    assert "bad.proto" in result.stdout


# What else the comments write in capitals: codes that carry no reason of ours, and names of enum values.
OTHER_CODES = {"DEADLINE_EXCEEDED", "UNAVAILABLE"}
CAPITALS = re.compile(r"\b[A-Z]{2,}(?:_[A-Z]+)+\b|\b(?:INTERNAL|UNAVAILABLE|UNAUTHENTICATED|ABORTED)\b")


def prose(path: Path) -> list[str]:
    """The comments of a contract, one block each."""
    lines = path.read_text().splitlines()
    text = "\n".join(match[1] if (match := re.match(r"\s*// ?(.*)", line)) else "\f" for line in lines)
    return [block.replace("\n", " ") for block in text.split("\f") if block.strip()]


def enum_values() -> set[str]:
    """With and without their prefixes."""
    names = {name for path in CONTRACTS for name in re.findall(r"^\s+([A-Z0-9_]+) = \d+;", path.read_text(), re.M)}
    return names | {name[index + 1 :] for name in names for index, letter in enumerate(name) if letter == "_"}


@pytest.mark.parametrize("path", CONTRACTS, ids=lambda path: path.stem)
def test_every_reason_in_a_contract_exists_under_the_code_before_it(path: Path) -> None:
    known = enum_values() | OTHER_CODES
    for block in prose(path):
        code = None
        for word in CAPITALS.findall(block):
            if word in Code.__members__:
                code = word
            elif word in Reason.__members__:
                assert code in (None, DomainError(Reason(word), "").code), f"{word} under {code}: {block}"
            else:
                code = None
                assert word in known, f"{word} is neither a reason nor a code: {block}"


def test_every_reason_is_named_in_a_contract() -> None:
    named = {word for path in CONTRACTS for block in prose(path) for word in CAPITALS.findall(block)}
    assert set(Reason.__members__) <= named


@pytest.mark.parametrize(
    "comment", ["NOT_FOUND EPISODE_CONFLICT", "NOT_FOUND UNKNOWN_EPISODE, UNKNOWN_THING", "INTERNAL UNKNOWN_TASK"]
)
def test_a_wrong_reason_is_noticed(tmp_path: Path, comment: str) -> None:
    path = tmp_path / "wrong.proto"
    path.write_text(f"// {comment}: why.\nservice S {{}}\n")
    with pytest.raises(AssertionError):
        test_every_reason_in_a_contract_exists_under_the_code_before_it(path)


def _reachable(message: Descriptor, seen: dict[str, Descriptor]) -> dict[str, Descriptor]:
    if message.full_name not in seen and not message.full_name.startswith("google."):
        seen[message.full_name] = message
        for field in message.fields:
            if field.message_type is not None:
                _reachable(field.message_type, seen)
    return seen


def test_lists_of_messages_and_of_items_with_rules_have_limits() -> None:
    """Each item costs a check. Settings of runs have theirs in `trainer/settings.py`; a learner's data were released
    without one."""
    found: dict[str, Descriptor] = {}
    for module in (
        env_service_pb2,
        policy_service_pb2,
        policy_admin_service_pb2,
        memory_service_pb2,
        learner_service_pb2,
    ):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                _reachable(method.input_type, found)
    without = []
    for message in found.values():
        for field in message.fields:
            rules = field.GetOptions().Extensions[validate_pb2.field]
            checked = field.message_type is not None or rules.repeated.HasField("items")
            limited = rules.repeated.HasField("max_items") or rules.map.HasField("max_pairs")
            if field.is_repeated and checked and not limited:
                without.append(f"{message.full_name}.{field.name}")
    calls = ("Forward", "ForwardBackward")
    assert len(found) > 50 and without == [f"mulligan.trainer.v1.{call}Request.data" for call in calls]
