"""The tokens of `mulligan up`: private, kept, and found by their user's programs as long as the services run."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mulligan.cli.connection import READER_TOKEN, TOKEN, endpoint, reader_token, service_token
from mulligan.cli.local import LocalServices
from mulligan.cli.local_tokens import LocalTokens, NotPrivate, announced, check_private, find_tokens
from mulligan.common.access import AccessRole
from mulligan.common.config import SERVICES
from mulligan.common.tokens import KnownTokens
from tests.support.paths import IMPORT_ROOTS
from tests.support.tokens import token_of, write_tokens

HERE = "127.0.0.1:50054"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of this test alone: the folder in which this machine's services are told."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "mulligan" / "services" / os.uname().nodename


@pytest.fixture
def tokens(tmp_path: Path) -> LocalTokens:
    made = LocalTokens(tmp_path / "runs")
    made.make()
    return made


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_tokens_can_be_read_by_their_user_alone_whatever_the_umask_is(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        tokens = LocalTokens(tmp_path / "runs")
        tokens.make()
    finally:
        os.umask(before)
    folders = [tokens.of("env"), tokens.of("policy")]
    assert [mode(folder) for folder in folders] == [0o700, 0o700]
    files = [folder / role for folder in folders for role in AccessRole]
    assert {mode(file) for file in files} == {0o600}
    assert len({file.read_text() for file in files}) == 8


def test_tokens_are_kept_and_missing_ones_are_made(tokens: LocalTokens) -> None:
    files = [tokens.of(name) / role for name in ("env", "memory") for role in AccessRole]
    before = [file.read_text() for file in files]
    files[-1].unlink()
    tokens.make()
    after = [file.read_text() for file in files]
    assert after[:-1] == before[:-1] and after[-1] not in before


def test_the_env_service_accepts_none_of_the_others_tokens(tokens: LocalTokens) -> None:
    """It runs the code of environments, to which callers' tokens may become known."""
    settings = tokens.settings()
    known = {name: KnownTokens(settings[name]["tokens_folder"]) for name in SERVICES}
    trainer = {name: f"Bearer {settings['trainer'][f'{name}_token_file'].read_text().strip()}" for name in SERVICES[:3]}
    assert {name: known[name].role_of(trainer[name]) for name in trainer} == {
        "env": AccessRole.ACTOR,
        "policy": AccessRole.TRAINER,
        "memory": AccessRole.TRAINER,
    }
    assert known["env"].role_of(trainer["policy"]) is None
    assert [known[name].role_of(trainer["env"]) for name in SERVICES[1:]] == [None, None, None]


@pytest.mark.parametrize("name", ["env-tokens", "tokens", "tokens/admin"])
def test_what_others_may_read_is_refused(tokens: LocalTokens, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tokens.folder / name
    private = mode(path)
    path.chmod(private | 0o040)
    with pytest.raises(NotPrivate, match=rf"/{name}: other users may use it \(mode {private | 0o040:o}\)"):
        tokens.make()
    path.chmod(private)
    tokens.make()
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(NotPrivate, match=f"/{name}: belongs to another user"):
        check_private(path)


def test_they_are_found_at_their_address_while_the_services_run(tokens: LocalTokens, state: Path) -> None:
    folders = {HERE: tokens.of("trainer"), "127.0.0.1:50051": tokens.of("env")}
    with announced(folders):
        assert {address: find_tokens(address) for address in folders} == folders
        assert [mode(state / address) for address in folders] == [0o600, 0o600]
        assert {mode(folder) for folder in (state, *state.parents[:2])} == {0o700}
        others = ("localhost:50054", "[::1]:50054", "10.0.0.7:50054", "127.0.0.1:50053", "unix:/tmp/x", "127.0.0.1")
        assert [find_tokens(address) for address in others] == [None] * len(others)
    assert [find_tokens(address) for address in folders] == [None, None]
    assert not list(state.iterdir())


def test_they_are_never_found_for_another_machine(tokens: LocalTokens, state: Path) -> None:
    with announced({"10.0.0.7:50054": tokens.of("trainer"), HERE: tokens.of("trainer")}):
        assert (state / "10.0.0.7:50054").read_text() == (state / HERE).read_text()
        assert find_tokens("10.0.0.7:50054") is None


ANNOUNCE = """
import sys, time
from pathlib import Path
from mulligan.cli.local_tokens import announced
with announced({sys.argv[1]: Path(sys.argv[2])}):
    print("announced", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_not_used_and_is_replaced(tokens: LocalTokens, state: Path) -> None:
    """Another user's program may listen there by now."""
    folder = tokens.of("trainer")
    command = [sys.executable, "-c", ANNOUNCE, HERE, str(folder)]
    environment = {**os.environ, "PYTHONPATH": IMPORT_ROOTS}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "announced\n"
        assert find_tokens(HERE) == folder
        assert (state / HERE).read_text() == f"{process.pid}\n{folder}\n"
        process.send_signal(signal.SIGKILL)
    assert (state / HERE).exists() and find_tokens(HERE) is None
    with announced({HERE: folder}):
        assert find_tokens(HERE) == folder


def test_an_end_leaves_what_others_have_announced_since(tokens: LocalTokens, state: Path) -> None:
    first = announced({HERE: tokens.of("env")})
    first.__enter__()
    with announced({HERE: tokens.of("trainer")}):
        first.__exit__(None, None, None)
        assert find_tokens(HERE) == tokens.of("trainer")


def test_what_another_user_announced_is_refused(
    tokens: LocalTokens, state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with announced({HERE: tokens.of("trainer")}):
        (state / HERE).chmod(0o644)
        with pytest.raises(NotPrivate, match="mode 644"):
            find_tokens(HERE)
        with pytest.raises(SystemExit, match="2"):
            endpoint(HERE)
        assert f"/{HERE}: other users may use it (mode 644)" in capsys.readouterr().err
        (state / HERE).chmod(0o600)
        (tokens.of("trainer") / "admin").chmod(0o640)
        with pytest.raises(SystemExit, match="2"):
            endpoint(HERE)
        assert "tokens/admin: other users may use it (mode 640)" in capsys.readouterr().err
        (tokens.of("trainer") / "admin").chmod(0o600)
        owner = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
        with pytest.raises(NotPrivate, match="belongs to another user"):
            find_tokens(HERE)


def test_a_link_is_not_followed(tokens: LocalTokens, state: Path) -> None:
    with announced({HERE: tokens.of("trainer")}):
        (state / "127.0.0.1:1").symlink_to(state / HERE)
        assert find_tokens("127.0.0.1:1") is None


def test_commands_have_the_token_that_is_found_unless_a_variable_names_one(
    tokens: LocalTokens, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tokens.of("trainer")
    admin, reader = ((folder / role).read_text().strip() for role in (AccessRole.ADMIN, AccessRole.READER))
    with announced({HERE: folder}):
        assert endpoint(HERE).token_file == folder / AccessRole.ADMIN
        assert (service_token(HERE), reader_token(HERE)) == (admin, reader)
        assert endpoint("127.0.0.1:1").token_file is None
        assert (service_token("127.0.0.1:1"), reader_token("127.0.0.1:1")) == (None, None)
        monkeypatch.setenv(TOKEN, token_of(AccessRole.TRAINER))
        assert (endpoint(HERE).token, endpoint(HERE).token_file) == (token_of(AccessRole.TRAINER), None)
        assert reader_token(HERE) is None
        monkeypatch.setenv(TOKEN, "")
        assert not endpoint(HERE).token and endpoint(HERE).token_file is None
        named = write_tokens(tmp_path) / AccessRole.ACTOR
        monkeypatch.setenv(f"{TOKEN}_FILE", str(named))
        assert (endpoint(HERE).token_file, reader_token(HERE)) == (named, None)
        monkeypatch.setenv(READER_TOKEN, token_of(AccessRole.READER))
        assert reader_token(HERE) == token_of(AccessRole.READER)


def test_services_start_without_a_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then a command is told which file it needs."""

    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert find_tokens(HERE) is None
    LocalServices(tmp_path)._announce()
    told = capsys.readouterr().err
    assert "this user has no home folder" in told
    assert f"they need MULLIGAN_CLI_TOKEN_FILE={tmp_path}/tokens/admin\n" in told
