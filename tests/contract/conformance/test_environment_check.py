"""`check_environment` and `mulligan env check`: what they say to the author of an environment with a fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mulligan.cli.app import app
from mulligan.conformance.local import check_environment
from mulligan.conformance.report import Report, Verdict
from tests.support.paths import IMPORT_ROOTS, ROOT

KIND = "tests.support.dice"
GUESSES = ("1", "3", "5", "6")
# Fault of the dice → the title under which its author reads of it, and words of what is said.
FAULTS = {
    "by-process": ("a task looks the same in another process", "here and"),
    "shared": ("a task begins with the same observation each time", "seeded with the task id"),
    "parses": ("no text makes step raise or hang", "ValueError: invalid literal for int()"),
    "hangs": ("no text makes step raise or hang", "not finished within 0.5 s"),
    "endless": ("whatever an agent writes, episodes go as they should", "it goes on after 5 steps, and max_steps is 5"),
    "generous": ("rewards are finite and add up to at most info.max_reward", "and max_reward is 1"),
    "cut-short": ("an episode ends after info.max_steps steps at the latest", "TRUNCATED after 1 steps"),
    "fork-shares": ("a fork plays on exactly as the episode does", "copy and original played"),
    "counts": ("list_tasks lists as many tasks as info.task_counts says, each in its split", "it lists 30"),
    "types": ("info is an EnvironmentInfo with values of the declared types", "info.max_steps: Input should be"),
    "no-info": ("info is an EnvironmentInfo with values of the declared types", "info is of type NoneType"),
    "list-raises": ("list_tasks(split, offset, limit) gives slices of one list", "the list is torn"),
    "undescribed": ("info is an EnvironmentInfo with values of the declared types", "info.description is empty"),
    "no-prompts": ("info.prompts has each text, with its placeholders", "prompts.trace_turn is 'a turn'"),
    "both-splits": ("each task is listed once, in one split", "both/0"),
    "no-train": ("there are tasks to train on, and tasks to test with", "there are no training tasks"),
    "no-test": ("there are tasks to train on, and tasks to test with", "there are no test tasks"),
    "twice": ("each task is listed once, in one split", "train/1 more than once"),
    "long-id": ("task ids are text of 1 to 200 characters", "has 201 characters"),
    "empty-id": ("task ids are text of 1 to 200 characters", "the id '' has 0 characters"),
    "number-id": ("task ids are text of 1 to 200 characters", "the id 7 is a int, not text"),
    "unsendable-id": ("task ids are text of 1 to 200 characters", "cannot be sent"),
    "odd-tags": ("list_tasks(split, offset, limit) gives slices of one list", "train/0: {'answerable': True}"),
    "no-offset": ("list_tasks(split, offset, limit) gives slices of one list", "list_tasks('train', 1, 3) gave"),
}


def checked(fault: str) -> Report:
    seconds = 0.5 if fault == "hangs" else 30.0
    return check_environment(KIND, {"fault": fault}, actions=40, known=GUESSES, step_seconds=seconds)


def test_an_environment_without_a_fault_passes() -> None:
    report = checked("")
    assert report.conforms and report.problems() == ""
    assert {result.why for result in report.of(Verdict.NOT_APPLICABLE)} == {
        "the environment is available",
        "the environment can be forked",
        "no step failed",
        "the lease is 600 s, and the check waits for at most 5 s",
    }


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_is_told_in_words(fault: str) -> None:
    title, words = FAULTS[fault]
    report = checked(fault)
    problems = report.problems()
    assert title in [result.title for result in report.violations], problems
    assert words in problems
    assert "INTERNAL" not in problems and "NOT_FOUND" not in problems, "no status codes for an author"


def test_the_traceback_is_the_authors_own() -> None:
    (result,) = checked("key-error").violations
    assert result.title == "start raises UnknownTask for an id that is not one of its tasks"
    assert "tests/support/dice.py" in result.traceback and "KeyError" in result.traceback
    assert "recorded.py" not in result.traceback


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match="dice: fualt: no such setting"):
        check_environment(KIND, {"fualt": "unseeded"})
    with pytest.raises(ValueError, match=r"pip install -e '\.\[ice\]'"):
        check_environment("tests.support.environments", {"missing": "ice"})


def test_the_command_tells_an_author_and_its_status_a_script() -> None:
    flags = ["env", "check", KIND, "--actions", "10", "--action", "3", "--set"]
    good = CliRunner().invoke(app, [*flags, "fault="])
    assert good.exit_code == 0 and "nothing is wrong" in good.output, good.output
    bad = CliRunner().invoke(app, [*flags, "fault=key-error"])
    assert bad.exit_code == 1 and "✗ start raises UnknownTask" in bad.output and "Traceback" in bad.output
    assert "1 of " in bad.output.splitlines()[-1]
    none = CliRunner().invoke(app, ["env", "check", "no.such.module"])
    assert none.exit_code == 2 and "is no environment" in none.output


def test_a_module_of_the_current_folder_is_found(tmp_path: Path) -> None:
    source = (ROOT / "tests" / "support" / "dice.py").read_text()
    (tmp_path / "own_dice.py").write_text(source)
    arguments = ["env", "check", "own_dice", "--actions", "0", "--set", "fault=unread"]
    result = subprocess.run(
        [sys.executable, "-m", "mulligan.cli", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": IMPORT_ROOTS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1 and "it is empty in step 0" in result.stdout, result.stdout + result.stderr
