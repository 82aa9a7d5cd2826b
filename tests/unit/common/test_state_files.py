"""Whatever happens to the bytes of a state file: what is read is what was written, and what is lost is told."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mulligan.common.errors import DomainError, Reason
from mulligan.common.state_files import LineLog, read_document, write_document
from tests.support.damage import Damage, damages
from tests.support.effort import examples
from tests.support.small_disk import SmallDisk

IN_A_FOLDER = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


class Line(msgspec.Struct, frozen=True):
    """Without defaults, and with an object at the end, as the entries of our logs."""

    number: int
    text: str
    parts: dict[str, float]


LINES = [Line(number, f'say "{number}" {{"a": 1}} – ü', {"a": number / 3, "b": 1e-300}) for number in range(5)]
NEW = Line(99, "new", {})


def written(path: Path) -> bytes:
    path.unlink(missing_ok=True)
    log = LineLog(path, Line)
    log.append(LINES[:2])
    log.append(LINES[2:])
    return path.read_bytes()


@settings(max_examples=examples(400), suppress_health_check=IN_A_FOLDER)
@given(data=st.data())
def test_damage_of_a_log_costs_the_lines_that_it_touches(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "log.jsonl"
    whole = written(path)
    damage = data.draw(damages(len(whole)))
    check_log(path, whole, damage)


@pytest.mark.parametrize("change", [0, 1])
def test_damage_of_each_single_byte_of_a_log(tmp_path: Path, change: int) -> None:
    path = tmp_path / "log.jsonl"
    whole = written(path)
    for place in range(len(whole)):
        check_log(path, whole, Damage(place, place + 1, change))


def check_log(path: Path, whole: bytes, damage: Damage) -> None:
    content = damage.of(whole)
    path.write_bytes(content)
    found, told = LineLog(path, Line).read()
    assert found == [line for line in LINES if line in found], "each as it was written, in order, and none twice"
    begin = 0
    lines = whole.splitlines(keepends=True)
    for line, text in zip(LINES, lines, strict=True):
        if not damage.touches(begin, begin + len(text) - 1):
            assert line in found
        begin += len(text)
    whole_lines_are_missing = set(content.splitlines()) <= {*whole.splitlines(), b""}
    assert told or found == LINES or whole_lines_are_missing
    for one in told:
        assert one.path == path and one.begin < one.end <= len(content)
        assert f"line {one.number} of {path}, bytes {one.begin} to {one.end}" in str(one)
    LineLog(path, Line).append([NEW])
    assert path.read_bytes().endswith(b"}\n")
    again, still = LineLog(path, Line).read()
    assert again == [*found, NEW], "the next line stands alone, and costs nothing that could be read"
    assert not any(one.torn for one in still)


def test_a_torn_end_is_told_and_cut_off_by_the_next_write_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = written(path)
    path.write_bytes(whole[:-7])
    found, [told] = LineLog(path, Line).read()
    assert found == LINES[:-1] and "line 5 of" in str(told) and "was cut off while it was written" in str(told)
    assert path.read_bytes() == whole[:-7], "a reader changes nothing: the file may be another process's"
    LineLog(path, Line).append(LINES[-1:])
    assert path.read_bytes() == whole


def test_a_log_of_an_earlier_release_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in LINES))
    LineLog(path, Line).append([NEW])
    assert LineLog(path, Line).read() == ([*LINES, NEW], [])
    for torn in (b'{"number":7,"te', b'{"number":7', b"\xff\x00"):
        path.write_bytes(msgspec.json.encode(LINES[0]) + b"\n" + torn)
        LineLog(path, Line).append([NEW])
        assert LineLog(path, Line).read() == ([LINES[0], NEW], [])


def test_a_line_without_checksum_has_no_other_members(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"number":1,"text":"","parts":{},"crc33":"00000000"}\n{"number":2,"text":"","parts":{}}\n')
    found, [told] = LineLog(path, Line).read()
    assert found == [Line(2, "", {})] and "'crc33'" in str(told)


def test_people_can_read_a_log_and_compute_its_checksums(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for line, text in zip(LINES, written(path).splitlines(), strict=True):
        read = json.loads(text)
        body, _, _ = text.rpartition(b',"crc32"')
        assert read.pop("crc32") == f"{zlib.crc32(body):08x}" and read == msgspec.to_builtins(line)


def test_on_a_full_disk_a_log_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    whole = written(path)
    SmallDisk(monkeypatch, 5)
    with pytest.raises(DomainError) as caught:
        LineLog(path, Line).append([NEW])
    assert caught.value.reason is Reason.DISK_FULL and path.read_bytes() == whole


def test_a_log_that_the_disk_does_not_give_is_told(tmp_path: Path) -> None:
    with pytest.raises(DomainError, match="cannot be read") as caught:
        LineLog(tmp_path, Line).read()
    assert caught.value.reason is Reason.STATE_DAMAGED and caught.value.metadata == {"file": str(tmp_path)}


DOCUMENTS: list[tuple[Any, Any]] = [(Line, LINES[1]), (dict[str, Line], {"a": LINES[0], "b": LINES[1]})]


@pytest.mark.parametrize(("kind", "value"), DOCUMENTS)
@settings(max_examples=examples(300), suppress_health_check=IN_A_FOLDER)
@given(data=st.data())
def test_a_damaged_document_is_not_read_as_another(tmp_path: Path, kind: Any, value: Any, data: st.DataObject) -> None:
    path = tmp_path / "state.json"
    whole = write_document(path, value)
    assert path.read_bytes() == whole and read_document(path, kind, "") == value
    path.write_bytes(data.draw(damages(len(whole))).of(whole))
    check_document(path, kind, value)


@pytest.mark.parametrize(("kind", "value"), DOCUMENTS)
@pytest.mark.parametrize("change", [0, 1])
def test_damage_of_each_single_byte_of_a_document(tmp_path: Path, kind: Any, value: Any, change: int) -> None:
    path = tmp_path / "state.json"
    whole = write_document(path, value)
    for place in range(len(whole)):
        path.write_bytes(Damage(place, place + 1, change).of(whole))
        check_document(path, kind, value)


def check_document(path: Path, kind: Any, value: Any) -> None:
    refused: DomainError | None = None
    try:
        assert read_document(path, kind, "Ask for help.") == value
    except DomainError as error:
        refused = error
    if refused is not None:
        assert refused.reason is Reason.STATE_DAMAGED and refused.metadata == {"file": str(path)}
        assert refused.message.startswith(f"{path} is damaged: ")
        assert "Ask for help. If you changed it" in refused.message


def test_a_document_of_an_earlier_release_is_read_and_so_is_one_that_a_person_changed(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text('{"number": 1, "text": "by hand", "parts": {}}')
    assert read_document(path, Line, "") == Line(1, "by hand", {})
    write_document(path, LINES[1])
    path.write_text(path.read_text().replace('"number": 1', '"number": 2'))
    with pytest.raises(DomainError, match="remove the member crc32") as caught:
        read_document(path, Line, "")
    assert "its crc32 is" in caught.value.message
    kept, _, _ = path.read_text().rpartition(",")
    path.write_text(kept + "}")
    assert read_document(path, Line, "").number == 2


def test_a_missing_document_is_no_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_document(tmp_path / "state.json", Line, "")
    with pytest.raises(DomainError, match="cannot be read"):
        read_document(tmp_path, Line, "")
