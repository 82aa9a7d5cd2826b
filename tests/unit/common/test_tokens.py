"""Files of tokens, and what a change of them does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mulligan.common.access import AccessRole
from mulligan.common.tokens import BadTokens, KnownTokens, TokenFile, bearer
from tests.support.tokens import token_of, write_tokens

ADMIN = AccessRole.ADMIN
OTHER = "another-token-that-nobody-guesses"


def header(token: str) -> str:
    ((name, value),) = bearer(token)
    assert name == "authorization"
    return value


def replace(path: Path, content: str) -> None:
    """By another file, as Kubernetes does and docs/security.md asks for."""
    new = path.with_name(f".{path.name}")
    new.write_text(content)
    os.replace(new, path)


def test_each_token_has_the_role_of_its_file(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path)
    (folder / AccessRole.ACTOR).write_text(f"# the second agent's\n{OTHER}\n\n  {token_of(AccessRole.ACTOR)}  \n")
    tokens = KnownTokens(folder)
    assert {role: tokens.role_of(header(token_of(role))) for role in AccessRole} == {role: role for role in AccessRole}
    assert tokens.role_of(header(OTHER)) is AccessRole.ACTOR


@pytest.mark.parametrize(
    "given",
    [
        "",
        "Bearer ",
        "Bearer",
        token_of(ADMIN),
        f"bearer{token_of(ADMIN)}",
        header(OTHER),
        "Bearer é\udcff",
    ],
)
def test_what_is_no_known_token_has_no_role(tmp_path: Path, given: str) -> None:
    tokens = KnownTokens(write_tokens(tmp_path, ADMIN))
    assert tokens.role_of(given) is None
    assert tokens.role_of(header(token_of(ADMIN))[:-1]) is None


class Clock:
    """Shows `now`."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_is_added_counts_at_once_and_what_is_removed_ends_within_a_second(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path, AccessRole.READER)
    tokens = KnownTokens(folder, clock := Clock())
    replace(folder / AccessRole.READER, f"{token_of(AccessRole.READER)}\n{OTHER}\n")
    assert tokens.role_of(header(OTHER)) is tokens.role_of(header(token_of(AccessRole.READER))) is AccessRole.READER
    replace(folder / AccessRole.READER, f"{OTHER}\n")
    clock.now += 1.0
    assert tokens.role_of(header(token_of(AccessRole.READER))) is None
    replace(folder / ADMIN, token_of(ADMIN))
    assert tokens.role_of(header(token_of(ADMIN))) is ADMIN, "a file that is new"
    (folder / AccessRole.READER).unlink()
    clock.now += 1.0
    assert tokens.role_of(header(OTHER)) is None


def test_a_token_that_is_not_known_has_the_files_looked_at_for_all(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path, AccessRole.READER, ADMIN)
    tokens = KnownTokens(folder, Clock())
    assert tokens.role_of(header(token_of(ADMIN))) is ADMIN
    (folder / ADMIN).unlink()
    assert tokens.role_of(header(OTHER)) is tokens.role_of(header(token_of(ADMIN))) is None


def test_a_file_is_not_looked_at_for_each_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = KnownTokens(write_tokens(tmp_path), Clock())
    assert tokens.role_of(header(token_of(ADMIN))) is ADMIN
    monkeypatch.setattr("mulligan.common.tokens.stamp", lambda path: pytest.fail(f"a look at {path}"))
    assert tokens.role_of(header(token_of(AccessRole.READER))) is AccessRole.READER


def test_a_change_that_is_wrong_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tokens(tmp_path, AccessRole.READER)
    tokens = KnownTokens(folder, clock := Clock())
    replace(folder / AccessRole.READER, "short\n")
    assert tokens.role_of(header(token_of(AccessRole.READER))) is AccessRole.READER
    assert tokens.role_of(header("short")) is None
    shown = capsys.readouterr().out
    assert shown.count("the tokens are those from before") == 1 and "short" not in shown
    clock.now += 1.0
    replace(folder / AccessRole.READER, OTHER)
    assert tokens.role_of(header(OTHER)) is AccessRole.READER


def test_a_token_that_a_change_puts_into_two_files_has_the_lesser_role(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path, AccessRole.READER, ADMIN)
    tokens = KnownTokens(folder)
    replace(folder / ADMIN, token_of(AccessRole.READER))
    assert tokens.role_of(header(token_of(AccessRole.READER))) is AccessRole.READER


def test_an_issued_token_is_of_this_process_alone(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path, AccessRole.READER)
    tokens = KnownTokens(folder)
    own = tokens.issue(AccessRole.TRAINER)
    assert tokens.issue(AccessRole.TRAINER) == own and tokens.role_of(header(own)) is AccessRole.TRAINER
    assert KnownTokens(folder).role_of(header(own)) is None


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "holds no token: expected a file for at least one role: reader, actor, trainer, admin"),
        ({"reader": "# none yet\n"}, "holds no token"),
        ({"admins": OTHER}, "admins: no such role; did you mean 'admin'"),
        ({"reader": "hunter2"}, "reader: token 1: expected one token per line, of 16 to 1,024 letters"),
        ({"reader": f"{OTHER}\nwith a space, and long"}, "reader: token 2: expected one token per line"),
        ({"reader": OTHER, "admin": OTHER}, "a token stands there twice"),
    ],
)
def test_a_bad_folder_is_told_without_its_tokens(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(BadTokens) as caught:
        KnownTokens(tmp_path)
    assert complaint in str(caught.value)
    assert OTHER not in str(caught.value) and "hunter2" not in str(caught.value)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadTokens, match="gone: cannot be read: No such file"):
        KnownTokens(tmp_path / "gone")


def test_hidden_names_are_left_alone(tmp_path: Path) -> None:
    """Kubernetes keeps the content of a mounted secret in a hidden folder."""
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "admin").write_text(OTHER)
    (tmp_path / "admin").symlink_to(Path("..data") / "admin")
    assert KnownTokens(tmp_path).role_of(header(OTHER)) is ADMIN


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "token: no such file"), (b" \n", "holds no token"), (b"\xff\xfe", "cannot be read"), (b"x y", "token 1")],
)
def test_a_callers_file_needs_a_token(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadTokens, match=complaint):
        TokenFile(file)
