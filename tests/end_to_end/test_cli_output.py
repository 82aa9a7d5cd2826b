"""What a person sees: data are never markup and never steer the terminal, ids are whole, hints work, stdout is results.

A real trainer with one completed run, a real memory, and commands in real terminals of several widths.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest

from mulligan.cli.ids import whole_id
from mulligan.common.channel import Endpoint
from mulligan.common.reflections import Provenance
from mulligan.common.text import safe
from mulligan.memory.client import MemoryClient
from mulligan.testing.loop import Loop, small_run
from mulligan.testing.processes import ServiceProcesses
from tests.support.paths import IMPORT_ROOTS, ROOT

RUN = "a-run-with-a-long-name-that-a-table-would-cut-20261126-012345"
HOSTILE = "\x1b[2J[/INST] [bold]rule[/bold] [red]A is \u202egoal\r:smile: \x07"


@pytest.fixture(scope="module")
def loop(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    loop = Loop.start(shared_services, tmp_path_factory.mktemp("loop"))
    asyncio.run(loop.train(RUN, small_run(steps=1, checkpoint_every=1)))
    return loop


@pytest.fixture(scope="module")
def reflections(loop: Loop) -> list[str]:
    """Ids of three entries of the scope `hostile`."""

    async def add() -> list[str]:
        client = MemoryClient(Endpoint(loop.memory.address))
        origin = Provenance("[run]", "e", "[env]", "[task]", 1, 0.0, 1.0, True)
        try:
            return [await client.add(f"r{number}", "hostile", HOSTILE, origin) for number in range(3)]
        finally:
            await client.close()

    return asyncio.run(add())


def addresses(loop: Loop) -> dict[str, str]:
    found = {"TRAINER": loop.trainer.address, "MEMORY": loop.memory.address, "POLICY": loop.policy.address}
    return {**os.environ, "PYTHONPATH": IMPORT_ROOTS} | {
        f"MULLIGAN_CLI_{name}": address for name, address in found.items()
    }


def piped(loop: Loop, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mulligan.cli", *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=addresses(loop), capture_output=True, text=True, check=False)
    assert ended.returncode == status and "Traceback" not in ended.stderr, ended.stdout + ended.stderr
    return ended


def on_a_terminal(loop: Loop, columns: int, *arguments: str) -> str:
    """All that the command sends to a terminal of so many columns."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in addresses(loop).items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-m", "mulligan.cli", *arguments],
        cwd=ROOT,
        env={**environment, "TERM": "xterm"},
        stdin=child,
        stdout=child,
        stderr=child,
    )
    os.close(child)
    sent = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        sent += part
    os.close(parent)
    assert process.wait(60) == 0, sent.decode()
    return sent.decode()


def test_data_are_neither_markup_nor_escape_sequences(loop: Loop, reflections: Sequence[str]) -> None:
    shown = "\\x1b[2J[/INST] [bold]rule[/bold] [red]A is \\u202egoal\\r:smile: \\x07"
    for arguments in (("list", "--scope", "hostile"), ("show", reflections[0])):
        assert shown in piped(loop, "memory", *arguments).stdout
        sent = on_a_terminal(loop, 400, "memory", *arguments)
        assert shown in sent and not {"\u202e", "\x07"} & set(sent) and "\x1b[2J" not in sent
    refused = piped(loop, "memory", "show", "\x1b[2Jnone[/x]", status=1).stderr
    assert "\x1b" not in refused and "[/x]" in refused


def test_a_long_list_of_reflections_is_cut_and_says_so(loop: Loop, reflections: Sequence[str]) -> None:
    listing = ("memory", "list", "--scope", "hostile")
    cut = piped(loop, *listing, "--limit", "1")
    assert len(cut.stdout.splitlines()) == 2 and f"{len(reflections) - 1} more: --all lists them" in cut.stderr
    for arguments in ((), ("--all", "--limit", "1"), ("--limit", str(len(reflections)))):
        whole = piped(loop, *listing, *arguments)
        assert len(whole.stdout.splitlines()) == 1 + len(reflections) and "more" not in whole.stderr


def test_whatever_is_printed_is_printable() -> None:
    every = "".join(map(chr, range(0x3000))) + "\ud800\U000e0001"
    assert all(one.isprintable() or one in "\n\t\u200c\u200d" for one in safe(every))
    assert safe("Übung 日本 👩‍👧\n\tx") == "Übung 日本 👩‍👧\n\tx"


@pytest.mark.parametrize("columns", [40, *(pytest.param(wide, marks=pytest.mark.long) for wide in (60, 80, 200))])
def test_ids_are_whole_in_terminals_of_any_width(loop: Loop, reflections: Sequence[str], columns: int) -> None:
    assert RUN in on_a_terminal(loop, columns, "runs")
    listed = on_a_terminal(loop, columns, "memory", "list", "--scope", "hostile")
    assert [one for one in reflections if one not in listed] == []
    watched = on_a_terminal(loop, columns, "watch", RUN)
    assert "step 1/1  left 0:00:00" in watched


@pytest.mark.long
def test_ids_are_whole_in_a_pipe_and_a_unique_beginning_is_enough(loop: Loop, reflections: Sequence[str]) -> None:
    [row] = piped(loop, "runs").stdout.splitlines()[1:]
    assert row.split()[0] == RUN
    for arguments in (("watch", RUN[:9]), ("experiences", RUN[:9], "--limit", "1"), ("stop", "a-run")):
        assert piped(loop, *arguments).stdout
    length = next(n for n in range(1, 64) if len({one[:n] for one in reflections}) == len(reflections))
    beginning = reflections[0][: length + 4]
    assert "scope       hostile" in piped(loop, "memory", "show", beginning).stdout
    assert "no run 'b-run'" in piped(loop, "stop", "b-run", status=1).stderr


def test_an_ambiguous_beginning_names_the_candidates(capsys: pytest.CaptureFixture[str]) -> None:
    assert whole_id("ab", ["ab", "abc"], "run") == "ab" and whole_id("b", ["ab", "bc"], "run") == "bc"
    with pytest.raises(SystemExit) as caught:
        whole_id("a", ["ab", "ac", "b"], "run")
    assert caught.value.code == 1 and "'a' begins the ids of several: ab, ac" in capsys.readouterr().err


def test_stopping_a_run_says_what_is_so(loop: Loop) -> None:
    assert f"run {RUN} is completed: there is nothing to stop" in piped(loop, "stop", RUN).stdout


def test_a_model_that_serves_already_is_not_said_to_be_loaded(loop: Loop) -> None:
    said = piped(loop, "policy", "load", "actor", "--model", "embedded").stdout
    assert "serves embedded already, as version" in said and "nothing was loaded" in said
    hint = said[said.index("For those that it began with: ") :].partition(": ")[2].partition(", then ")[0]
    words = shlex.split(hint)
    assert words[1:] == ["policy", "versions", "actor"]
    assert "original" in piped(loop, *words[1:]).stdout


def test_an_evaluation_tells_how_far_it_is_and_what_came_of_it_so_far(loop: Loop) -> None:
    sent = on_a_terminal(loop, 120, "eval", "frozenlake-3x3", "--tasks", "20", "--samples", "1", "--max-tokens", "4")
    assert "/20 attempts" in sent and "success so far" in sent and "attempts     20 (0 excluded)" in sent
    ended = piped(loop, "eval", "frozenlake-3x3", "--tasks", "2", "--samples", "1", "--max-tokens", "4")
    assert [line.split()[0] for line in ended.stdout.splitlines()] == ["success", "mean", "attempts", "policy"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "frozenlake-3x3", "--samples", "-1"),
        ("eval", "frozenlake-3x3", "--top-p", "0"),
        ("eval", "frozenlake-3x3", "--max-tokens", "99999999999"),
        ("eval", "\udcff"),  # a byte that is no UTF-8
        ("experiences", RUN, "--limit", "-1"),
        ("up", "--folder", "/proc/none"),
        ("demo", "--folder", "/proc/none"),
        ("up", "--port-base", "70000"),
        ("train", "no-such-recipe.toml"),
        ("train", "recipes"),
        ("policy", "versions", "--limit", "0"),
        ("conformance", "env", "--timeout", "0"),
    ],
)
def test_what_is_called_wrongly_is_one_sentence_and_status_2(loop: Loop, arguments: tuple[str, ...]) -> None:
    said = piped(loop, *arguments, status=2).stderr
    assert "rror" in said  # typer's has a frame


def test_the_reader_of_a_pipe_may_leave(loop: Loop) -> None:
    shown = subprocess.Popen(
        [sys.executable, "-m", "mulligan.cli", "experiences", RUN, "--json", "--limit", "100"],
        cwd=ROOT,
        env=addresses(loop),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert shown.stdout is not None and shown.stderr is not None
    shown.stdout.read(1)
    shown.stdout.close()
    assert b"Traceback" not in shown.stderr.read()
    assert shown.wait(60) in (0, 1)
    shown.stderr.close()


def test_results_alone_are_on_stdout(loop: Loop, services: ServiceProcesses) -> None:
    """The warning that a service is away goes to stderr, in the middle of JSON, too."""
    lines = piped(loop, "experiences", RUN, "--json", "--limit", "2").stdout.splitlines()
    assert [json.loads(line)["run_id"] for line in lines] == [RUN] * 2
    gone = services.start("memory")
    gone.kill()
    environment = addresses(loop) | {"MULLIGAN_CLI_MEMORY": gone.address}
    ended = subprocess.run(
        [sys.executable, "-m", "mulligan.cli", "memory", "list"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "" and "waiting for a service" in ended.stderr and ended.returncode == 1


@pytest.mark.parametrize("missing", ["typer", "rich", "msgspec"])
def test_a_command_without_its_packages_says_what_installs_them(tmp_path: Path, missing: str) -> None:
    absent = f"raise ModuleNotFoundError('there is no {missing}', name='{missing}')"
    (tmp_path / f"{missing}.py").write_text(absent)
    ended = subprocess.run(
        [sys.executable, "-c", "from mulligan.cli.__main__ import main; main()", "runs"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), IMPORT_ROOTS])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "pip install -e '.[cli]'" in ended.stderr and missing in ended.stderr
