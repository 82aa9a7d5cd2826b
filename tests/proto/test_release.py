"""What was released of v1 is kept (`buf breaking`), and docs/contracts.md says what the contracts say."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import descriptor_pb2

from mulligan.common.errors import DomainError, Reason
from tests.support.made import buf
from tests.support.paths import ROOT

PROTO = ROOT / "proto"
RELEASED = PROTO / "released" / "v1.binpb"
ENV = Path("mulligan/env/v1/env_service.proto")


def load_document() -> ModuleType:
    spec = spec_from_file_location("document", PROTO / "document.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["document"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


document = load_document()


def breaking(proto: Path) -> subprocess.CompletedProcess[str]:
    command = [str(buf()), "breaking", str(proto), "--against", str(RELEASED)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def changed(folder: Path, old: str, new: str, path: Path = ENV) -> Path:
    """A copy of the contracts in which one text is another."""
    proto = Path(shutil.copytree(PROTO, folder / "proto", ignore=shutil.ignore_patterns("__pycache__")))
    text = (proto / path).read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path}"
    (proto / path).write_text(text.replace(old, new))
    return proto


def test_nothing_that_was_released_has_changed() -> None:
    result = breaking(PROTO)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        pytest.param("  Split split = 2;\n", "", 'field "2" with name "split"', id="a field is removed"),
        pytest.param("  Split split = 2;\n", "  reserved 2;\n", 'field "2" with name "split"', id="and reserved"),
        pytest.param("double difficulty = 3;", "double difficulty = 40;", "difficulty", id="a field is renumbered"),
        pytest.param("double difficulty = 3;", "double hardness = 3;", "hardness", id="a field is renamed"),
        pytest.param("double difficulty = 3;", "float difficulty = 3;", "float", id="a field has another type"),
        pytest.param(
            "  rpc EndEpisode(EndEpisodeRequest) returns (EndEpisodeResponse);\n",
            "",
            "EndEpisode",
            id="a call is removed",
        ),
        pytest.param(
            "rpc StepEpisode(StepEpisodeRequest) returns (StepEpisodeResponse)",
            "rpc StepEpisode(StepEpisodeRequest) returns (stream StepEpisodeResponse)",
            "StepEpisode",
            id="a call streams",
        ),
        pytest.param("  SPLIT_TEST = 2;\n", "", 'value "2" on enum "Split"', id="an enum value is removed"),
        pytest.param("optional double reward = 3;", "double reward = 3;", "reward", id="a field is no longer optional"),
    ],
)
def test_a_change_that_v1_may_not_make_is_refused(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    result = breaking(changed(tmp_path, old, new))
    assert result.returncode != 0
    assert complaint in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("double difficulty = 3;", "double difficulty = 3;\n  string author = 40;", id="a field"),
        pytest.param("  SPLIT_TEST = 2;", "  SPLIT_TEST = 2;\n  SPLIT_VALIDATION = 3;", id="an enum value"),
        pytest.param(
            "  rpc EndEpisode(EndEpisodeRequest)",
            "  rpc EndEpisodeNow(EndEpisodeRequest) returns (EndEpisodeResponse);\n  rpc EndEpisode(EndEpisodeRequest)",
            id="a call",
        ),
    ],
)
def test_an_addition_is_allowed(tmp_path: Path, old: str, new: str) -> None:
    result = breaking(changed(tmp_path, old, new))
    assert result.returncode == 0, result.stdout + result.stderr


def constraints(files: list[descriptor_pb2.FileDescriptorProto]) -> dict[str, list[str]]:
    """In words, by the full name of the field."""

    def walk(message: descriptor_pb2.DescriptorProto, scope: str) -> Iterator[tuple[str, list[str]]]:
        name = f"{scope}.{message.name}"
        yield from ((f"{name}.{field.name}", document.constraints(field)) for field in message.field)
        for nested in message.nested_type:
            yield from walk(nested, name)

    ours = [file for file in files if file.package.startswith("mulligan.")]
    return {
        name: words for file in ours for message in file.message_type for name, words in walk(message, file.package)
    }


def test_no_constraint_of_a_released_field_has_changed() -> None:
    """One that is tightened breaks clients. One that is loosened is released: `make release-contract`."""
    # An image of buf is a FileDescriptorSet with a further field per file.
    released = constraints(list(descriptor_pb2.FileDescriptorSet.FromString(RELEASED.read_bytes()).file))
    now = constraints([source.file for source in document.sources()])
    assert any(released.values())
    assert {name: now[name] for name in released} == released


# --- docs/contracts.md


def test_the_committed_page_is_what_the_generator_writes() -> None:
    command = [sys.executable, str(PROTO / "document.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_page_that_is_not_fresh_is_noticed(tmp_path: Path) -> None:
    proto = changed(tmp_path, "// How many steps the episode has played.", "// How many steps it has played.")
    (tmp_path / "docs").mkdir()
    for name in ("contracts.md", "security.md"):
        shutil.copyfile(ROOT / "docs" / name, tmp_path / "docs" / name)
    command = [sys.executable, str(proto / "document.py")]
    stale = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
    assert stale.returncode == 1 and "make proto" in stale.stderr
    assert subprocess.run(command, check=False).returncode == 0
    assert subprocess.run([*command, "--check"], check=False).returncode == 0


@pytest.fixture(scope="module")
def page() -> str:
    return str(document.page(document.sources()))


def test_the_page_begins_with_what_v1_may_change(page: str) -> None:
    assert page.index("What v1 may change") < page.index("## Services")


def test_every_declaration_is_on_the_page(page: str) -> None:
    for source in document.sources():
        package = source.file.package
        for declared in (*source.file.message_type, *source.file.enum_type, *source.file.service):
            assert f"### {package}.{declared.name}\n" in page
        for service in source.file.service:
            assert all(f"#### {service.name}.{method.name}\n" in page for method in service.method)


def test_every_link_has_its_heading(page: str) -> None:
    headings = {line.lstrip("# ").replace(".", "").lower() for line in page.splitlines() if line.startswith("#")}
    links = {part.partition(")")[0] for part in page.split("](#")[1:]}
    assert links and links <= headings


def test_the_table_of_errors_has_every_reason_under_its_code(page: str) -> None:
    table = page.partition("## Errors")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert {(row[1], row[0].removeprefix("| ")) for row in rows} == {
        (str(reason), str(DomainError(reason, "").code)) for reason in Reason
    }


def test_a_fields_row_has_its_comment_and_its_constraint(page: str) -> None:
    assert "| 3 | `page_size` | int32 | At most 1,000; 0 means 100. *≥ 0 and ≤ 1,000* |" in page
    assert (
        "| 1 | `steps` | repeated [StepEpisodeRequest](#mulliganenvv1stepepisoderequest) | *1 to 1,024 items* |" in page
    )
    assert "| 1 | `step` | [StepEpisodeResponse](#mulliganenvv1stepepisoderesponse) | *one of `result`* |" in page


def test_a_constraint_without_words_stops_the_generator(tmp_path: Path) -> None:
    """Rather than leave it out."""
    field = next(
        field
        for source in document.sources()
        for message in source.file.message_type
        for field in message.field
        if field.name == "page_token" and document.constraints(field)
    )
    field.options.Extensions[document.validate_pb2.field].string.email = True
    with pytest.raises(NotImplementedError, match="email"):
        document.constraints(field)
