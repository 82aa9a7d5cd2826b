"""`mulligan env new` and `play`, as a person uses them: outside of this repository, from a pipe, at a server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mulligan.cli.app import app
from mulligan.common.extras import how_to_install
from mulligan.testing.processes import ServiceProcess, ServiceProcesses
from tests.support.paths import IMPORT_ROOTS, ROOT

TWO = "tests.support.two_players"


def run(*arguments: str, typed: str = "") -> Result:
    return CliRunner().invoke(app, ["env", *arguments], input=typed)


def there(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A process of its own in that folder, which finds the installed distribution and nothing else of the tests."""
    environment = {**os.environ, "PYTHONPATH": IMPORT_ROOTS, "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


# new


@pytest.mark.timeout(300)
def test_a_new_environment_works_outside_of_the_repository(tmp_path: Path) -> None:
    made = there(tmp_path, "-m", "mulligan.cli", "env", "new", "word_chain", "--folder", "my games")
    assert made.returncode == 0, made.stderr
    folder = tmp_path / "my games"
    assert sorted(path.name for path in folder.iterdir()) == ["test_word_chain.py", "word_chain.py"]
    wrote, tested, blank, next_, *commands = made.stdout.splitlines()
    assert (wrote, tested) == ("wrote my games/word_chain.py", "wrote my games/test_word_chain.py")
    assert (blank, next_) == ("", "Next:")
    endings = ("cd 'my games'", " env play word_chain", " env check word_chain", " -m pytest test_word_chain.py")
    assert len(commands) == 4 and all(map(str.endswith, commands, endings))
    text = (folder / "word_chain.py").read_text() + (folder / "test_word_chain.py").read_text()
    assert "my_game" not in text.lower() and "MyGame" not in text and "class WordChainEpisode:" in text

    checked = there(folder, "-m", "mulligan.cli", "env", "check", "word_chain")
    assert checked.returncode == 0 and "nothing is wrong" in checked.stdout, checked.stdout + checked.stderr
    tested_there = there(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_word_chain.py")
    assert tested_there.returncode == 0 and "2 passed" in tested_there.stdout, tested_there.stdout
    linted = there(folder, "-m", "ruff", "check", "--isolated", "--select", "E,F,W,B", "--line-length", "120", ".")
    assert linted.returncode == 0, linted.stdout

    again = run("new", "word_chain", "--folder", str(folder))
    assert again.exit_code == 1
    assert again.output == f"error: {folder / 'word_chain.py'} is there already; nothing was written\n"


def test_a_broken_one_is_found_by_its_test(tmp_path: Path) -> None:
    """The test that is written can fail."""
    assert run("new", "lottery", "--folder", str(tmp_path)).exit_code == 0
    file = tmp_path / "lottery.py"
    file.write_text(file.read_text().replace("random.Random(task_id)", "random.Random()"))
    tested = there(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_lottery.py")
    assert tested.returncode == 1 and "test_it_keeps_what_an_environment_promises" in tested.stdout
    assert "seeded with the task id" in tested.stdout, "the report says what to do"


def test_only_one_of_the_files_being_there_is_enough_to_write_none(tmp_path: Path) -> None:
    (tmp_path / "test_chess_game.py").write_text("mine")
    refused = run("new", "chess_game", "--folder", str(tmp_path))
    assert refused.exit_code == 1 and "test_chess_game.py is there already; nothing was written" in refused.output
    assert [path.name for path in tmp_path.iterdir()] == ["test_chess_game.py"]
    assert (tmp_path / "test_chess_game.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *(
            (name, "expected a Python identifier")
            for name in ("word-chain", "2048", "", "class", "../x", "a.b", "café")
        ),
        ("__", "expected a letter or digit"),
        ("sokoban", "an environment of mulligan, or one that is installed, has this name"),
        ("gymnasium", "an environment of mulligan, or one that is installed, has this name"),
        ("numpy", "a module that is installed has this name"),
        ("random", "a module that is installed has this name"),
    ],
)
def test_names_that_no_module_can_have_are_refused(tmp_path: Path, name: str, problem: str) -> None:
    refused = run("new", "--folder", str(tmp_path), "--", name)
    assert refused.exit_code == 2 and f"error: {name!r}: {problem}" in refused.output
    assert not list(tmp_path.iterdir())


def test_names_that_could_clash_give_files_that_work(tmp_path: Path) -> None:
    names = ("task_info", "mapping", "_2", "x", "my_game", "split")
    for name in names:
        assert run("new", name, "--folder", str(tmp_path)).exit_code == 0
    game = "module.create('n', module.Settings())"
    code = f"for module in map(__import__, {names}): print({game}.start('train/00001').observation)"
    started = there(tmp_path, "-c", code)
    assert started.stdout == "I have a number from 1 to 20.\n" * len(names), started.stderr


# play


def test_an_episode_is_played_from_a_pipe() -> None:
    played = run(
        *("play", "frozenlake", "--set", "size_min=2", "--set", "size_max=2", "--set", "test_tasks=1"),
        *("--set", "max_steps=3", "--prompt"),
        typed="nothing\n:help\n```Up```\n```Up```\n",
    )
    assert played.exit_code == 0, played.output
    lines = played.output.splitlines()
    assert lines[0] == "frozenlake: FrozenLake with hidden symbols, 2x2 to 2x2, 3 moves"
    assert lines[1] == "task train/00000, at most 3 steps, reward at most 1"
    assert "You are a reasoning agent in a grid world." in lines[3]
    assert "step 1, read as: invalid" in lines and ":restart  the same task from its beginning" in lines
    assert any(line.startswith(("truncated after 3 steps", "completed after ")) for line in lines)
    assert lines[-1].startswith("feedback: The ")


def test_players_tools_and_answers_of_several_lines() -> None:
    played = run("play", TWO, "--end", ".", typed=":tools\nlook\n.\n:restart\ntwo\nlines\n.\ntwo\nlines\n.\n")
    assert played.exit_code == 0, played.output
    assert "look: Look at the table\n  {" in played.output
    assert "read as: look()\n\nlook answers:\n\\x1b[2Jnothing\n" in played.output
    assert "from the beginning:\n\nName a number.\n\nplayer 1's turn\n" in played.output
    assert "step 1, read as: 'two\\nlines'\n\nWhich one was it?\n\nplayer 0's turn\n" in played.output
    assert played.output.endswith(
        "Over.\n\ncompleted after 2 steps, reward 1 for player 0, -0.5 for player 1\nfeedback: That was all.\n"
    )


def test_what_goes_wrong_is_said() -> None:
    raised = run("play", TWO, typed="raise\n")
    assert raised.exit_code == 1
    assert "KeyError: 'the dice are lost'" in raised.output and "Traceback" in raised.output
    assert "error: env_error: KeyError: 'the dice are lost'" in raised.output
    left = run("play", TWO, typed="5\n")
    assert left.exit_code == 0 and left.output.endswith("left after 1 steps, reward 0 for player 0, 0.5 for player 1\n")
    for arguments, status, problem in (
        (("frozenlake", "--task", "train/x"), 1, "'frozenlake' has no task 'train/x'"),
        ((TWO, "--split", "test"), 1, "two-players has no task in test"),
        (("frozenlake", "--set", "size_max=1"), 2, "size_min and size_max must satisfy"),
        (("no_such_kind",), 2, "there is no environment 'no_such_kind'; there are constrained_writing, frozenlake"),
        (("no.such.kind",), 2, "'no.such.kind' is no environment: No module named 'no'"),
        (("json",), 2, "'json' is no environment"),
        (("x", "--target", "127.0.0.1:1", "--set", "a=1"), 2, "do not go with --target"),
        (("tests.support.environments", "--set", "missing=ice"), 1, "pip install -e '.[ice]'"),
    ):
        refused = run("play", *arguments, typed="")
        assert refused.exit_code == status and problem in refused.output, refused.output


def test_settings_of_the_service_name_environments(tmp_path: Path) -> None:
    config = tmp_path / "env.toml"
    config.write_text('[environments.tiny]\nkind = "frozenlake"\nsize_max = 3\n')
    played = run("play", "tiny", "--config", str(config), "--set", "size_min=3", typed=":quit\n")
    assert played.output.startswith("tiny: FrozenLake with hidden symbols, 3x3 to 3x3")


@pytest.fixture(scope="module")
def server(shared_services: ServiceProcesses) -> ServiceProcess:
    tables = {"two": {"kind": TWO}, "lake": {"kind": "frozenlake", "test_tasks": 3}}
    return shared_services.start("env", environments=tables, max_episodes=1)


def test_an_episode_is_played_at_a_server(server: ServiceProcess) -> None:
    """Which has room for one: what was left must have been ended there."""
    target = ("--target", server.address)
    for typed in ("look\n", ":restart\n:quit\n", "5\n5\n", "5\n:restart\n4\n5\n"):
        played = run("play", "two", *target, typed=typed)
        assert played.exit_code == 0, played.output
    assert played.output.endswith("reward -1 for player 0, 1.5 for player 1\nfeedback: That was all.\n")
    lake = run("play", "lake", *target, "--split", "test", "--task", "test/00002", typed="```Up```\n")
    assert "task test/00002, at most 8 steps" in lake.output and "step 1, read as: Up" in lake.output
    broken = run("play", "two", *target, typed="raise\n")
    assert broken.exit_code == 1 and "env_error: KeyError" in broken.output
    for arguments, problem in (
        (("three", *target), "no environment 'three'"),
        (("lake", *target, "--task", "x"), "no task 'x'"),
    ):
        refused = run("play", *arguments)
        assert refused.exit_code == 1 and problem in refused.output, refused.output


def test_an_episode_is_kept_while_a_person_thinks(services: ServiceProcesses) -> None:
    """The last call is repeated in time: first the start, then the step."""
    server = services.start("env", environments={"two": {"kind": TWO}}, lease_seconds=9.0)
    playing = subprocess.Popen(
        [sys.executable, "-m", "mulligan.cli", "env", "play", "two", "--target", server.address],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": IMPORT_ROOTS},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert playing.stdin is not None and playing.stdout is not None
    try:
        for player, call, count in ((1, "StartEpisode", 2), (0, "StepEpisode", 1)):  # a first step is in StepEpisodes
            while f"player {player}'s turn" not in playing.stdout.readline():
                assert playing.poll() is None
            while sum(line.get("method") == call for line in server.log_lines) < count:
                assert playing.poll() is None
                time.sleep(0.02)
            playing.stdin.write("5\n")
            playing.stdin.flush()
        assert "completed after 2 steps" in playing.stdout.read()
    finally:
        playing.kill()
        playing.communicate()


@pytest.mark.parametrize("target", [False, True])
def test_an_interrupt_ends_it_cleanly(server: ServiceProcess, target: bool) -> None:
    arguments = ["two", "--target", server.address] if target else [TWO]
    playing = subprocess.Popen(
        [sys.executable, "-m", "mulligan.cli", "env", "play", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": IMPORT_ROOTS},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert playing.stdout is not None
    while "player 1's turn" not in playing.stdout.readline():
        assert playing.poll() is None
    playing.send_signal(signal.SIGINT)
    output, _ = playing.communicate(timeout=60)
    assert (playing.returncode, output) == (130, "\nleft\n")
    assert run("play", "two", "--target", server.address, typed="5\n").exit_code == 0, "the place is free"


# What is not installed


def test_what_is_not_installed_is_listed_with_its_extra(tmp_path: Path) -> None:
    """A Python whose packages are those that are here, without two of them."""
    hidden = ("gymnasium", "reasoning_gym")
    (installed,) = {Path(path).resolve() for path in sys.path if path.endswith("site-packages")}
    for entry in installed.iterdir():
        if not entry.name.startswith(hidden):
            (tmp_path / entry.name).symlink_to(entry)
    code = """
from mulligan.env.config import EnvSettings
for name, environment in EnvSettings().create_environments().items():
    print(name, "|", environment.info.unavailable)
"""
    listed = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PATH": os.defpath, "PYTHONPATH": os.pathsep.join([IMPORT_ROOTS, str(tmp_path)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert listed.returncode == 0, listed.stderr
    problems = dict(line.split(" | ") for line in listed.stdout.replace("|\n", "| \n").splitlines())
    assert problems.pop("gymnasium-frozenlake").endswith(f"No module named 'gymnasium'): {how_to_install('gymnasium')}")
    assert problems.pop("reasoning-gym").endswith(
        f"No module named 'reasoning_gym'): {how_to_install('reasoning-gym')}"
    )
    assert "frozenlake" in problems and not any(problems.values())
