"""The browser of experiences in a terminal, by its keys: Textual's own pilot presses them."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
from rich.cells import cell_len
from textual.pilot import Pilot
from textual.widgets import Input

from mulligan.console.facts import packed
from mulligan.console.index import ExperienceIndex
from mulligan.console.terminal.app import THEMES, ExperienceBrowser, warnings_kept
from mulligan.console.terminal.rows import RowsView
from mulligan.testing.recorded_runs import write_run, write_step
from mulligan.trainer.folder import RunFolder

HOSTILE = "[red]red[/red] [link=x]y[/] \x1b[2J\x1b]0;title\x07\u202e\rend"
WRITTEN = "[red]red[/red] [link=x]y[/] \\x1b[2J\\x1b]0;title\\x07\\u202e\\rend"
SECONDS = 30.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with two groups of three rollouts."""
    return write_run(tmp_path_factory.mktemp("runs"), "run", rollouts=3, says=HOSTILE).path


class Looked:
    """A browser, what it shows, and its keys."""

    def __init__(self, app: ExperienceBrowser, pilot: Pilot[None]) -> None:
        self.app = app
        self._pilot = pilot

    @property
    def text(self) -> str:
        strips = self.app.screen._compositor.render_strips()
        return "\n".join("".join(segment.text for segment in strip) for strip in strips)

    async def press(self, *keys: str, until: str = "") -> str:
        """The screen, once `until` stands on it."""
        await self._pilot.press(*keys)
        await self.wait(lambda: until in self.text)
        return self.text

    async def wait(self, there: Callable[[], bool]) -> None:
        began = time.monotonic()
        while not there():
            assert time.monotonic() - began < SECONDS, self.text
            await self._pilot.pause(0.02)

    async def resize(self, columns: int) -> None:
        await self._pilot.resize_terminal(columns, 30)
        await self.wait(lambda: {cell_len(line) for line in self.text.splitlines()} == {columns})
        await self._pilot.pause(0.1)

    async def filter(self, typed: str, begins: str = "", until: str = "") -> str:
        """The screen, once it begins with this, or `until` stands on it."""
        await self.press("slash")
        self.app.screen.query_one(Input).value = typed
        await self._pilot.press("enter")
        await self.wait(lambda: self.text.startswith(begins) and until in self.text)
        return self.text


@asynccontextmanager
async def looking(folder: Path, cache: Path, *, count: int, columns: int = 100) -> AsyncIterator[Looked]:
    """Once so many experiences are listed."""
    index = ExperienceIndex(cache / "index.sqlite")
    app = ExperienceBrowser(folder, index)
    async with app.run_test(size=(columns, 30)) as pilot:
        looked = Looked(app, pilot)
        await looked.wait(lambda: f"{count:,} experiences" in looked.text and "being read" not in looked.text)
        yield looked
    index.close()


async def test_the_keys_of_the_web_page(folder: Path, tmp_path: Path) -> None:
    async with looking(folder, tmp_path, count=18) as one:
        assert "first 0 · reflection 1 · second 1" in one.text and "train/00001" in one.text
        shown = await one.press("j", "enter", until="fell into hole")
        assert "run-s2-t0-r1" in shown and "system prompt" in shown and "▌ first completed" in shown
        assert "5 tokens, 2 of them sampled; trained as first (policy_gradient, weight 0.5, advantage 0.25)" in shown
        await one.press("n", until="run-s2-t0-r2")
        await one.press("p", "p", until="run-s2-t0-r0")
        await one.press("p", until="this is the first one")
        await one.press("n", until="run-s2-t0-r1")
        assert "▌   reflection completed" in await one.press("j")
        assert "▌ first completed" in await one.press("k")
        await one.press("u", until="18 experiences")
        assert one.app.screen.query_one(RowsView).chosen == 1
        assert "the turn that failed" in await one.press("question_mark", until="Keys")
        await one.press("u", until="18 experiences")
        await one.press("q")
    assert one.app.return_code == 0


async def test_tokens_one_by_one(folder: Path, tmp_path: Path) -> None:
    async with looking(folder, tmp_path, count=18) as one:
        await one.press("j", "enter", until="fell into hole")
        shown = await one.press("enter", until="token by token")
        assert "id 5 · sampled · log-probability -0.1000 · version 3 · advantage 0.25 · trained" in shown
        assert "log-probability -2.0000" in await one.press("j")
        assert "id 3 · prompt" in await one.press("k", "left")
        await one.press("u", "j", "enter", until="reflection · token by token")
        assert "not trained" in one.text


async def test_to_the_turns_that_failed(folder: Path, tmp_path: Path) -> None:
    async with looking(folder, tmp_path, count=18) as one:
        await one.press("enter", until="fell into hole")
        await one.press("f", until="no turn failed")
        await one.press("n", until="run-s2-t0-r1")
        await one.press("j", "j", "f")
        assert "▌ first completed" in one.text, "the sample of that turn is chosen"


async def test_a_group_side_by_side_and_one_after_another(folder: Path, tmp_path: Path) -> None:
    for columns, beside in ((200, 3), (100, 2), (40, 1)):
        cache = tmp_path / str(columns)
        async with looking(folder, cache, count=18, columns=columns) as one:
            shown = await one.press("g", until="rollout 0")
            assert sum(f"rollout {number}" in shown.splitlines()[1] for number in range(3)) == beside
            await one.press("j", "enter", until="run-s2-t0-r1")
            await one.press("n", until="run-s2-t0-r2")
            await one.press("n", until="this is the last one")
            await one.press("u", "u", until="18 experiences")


async def test_filters(folder: Path, tmp_path: Path) -> None:
    async with looking(folder, tmp_path, count=18) as one:
        await one.press("slash", *"step=1", "enter", until="6 experiences · step=1 · run")
        await one.filter("role=second to=0", "12 experiences")
        await one.filter("from=0.5 step=0", "2 experiences")
        await one.filter("fell environment=frozenlake-3x3 outcome=completed", "18 experiences")
        chosen = one.app.screen.query_one(RowsView).row
        assert chosen is not None and chosen.experience_id == "run-s0-t0-r0", "it stays chosen"
        await one.press("enter", until="run-s0-t0-r0")
        await one.press("u", until="18 experiences")
        shown = await one.filter("role=secnd", "0 experiences")
        assert "none has the role 'secnd'; did you mean 'second'?" in " ".join(shown.split())
        await one.filter("", "18 experiences")
        await one.filter("stp=1", until="no filter is named 'stp'; did you mean 'step'?")
        assert "18 experiences" in await one.press("escape"), "a bad filter changes nothing"
        await one.filter('"stp=1"', "0 experiences")


@pytest.mark.parametrize("columns", [40, 80, 200])
async def test_what_a_model_wrote_is_text(folder: Path, tmp_path: Path, columns: int) -> None:
    async with looking(folder, tmp_path, count=18, columns=columns) as one:
        seen = [one.text, await one.press("j", "enter", until="fell into hole"), await one.press("j", "j")]
        whole = one.text
        assert WRITTEN.replace(" ", "") in "".join(line.strip("▌ ▁▂▃▄▅▆▇") for line in whole.splitlines()).replace(
            " ", ""
        )
        seen += [await one.press("enter", until="token by token"), await one.press("u", "g", until="rollout 0")]
        seen.append(await one.press("question_mark", until="Keys"))
        assert not [one for one in "\x1b\u202e\r\x07" if any(one in text for text in seen)]
        assert {cell_len(line) for text in seen for line in text.splitlines()} == {columns}


async def test_a_window_that_changes_its_size(folder: Path, tmp_path: Path) -> None:
    async with looking(folder, tmp_path, count=18, columns=120) as one:
        await one.press("j", "enter", until="fell into hole")
        await one.press("j")
        await one.resize(40)
        assert "▌   reflection completed reward 1 ·" in one.text
        await one.press("u", until="18 experiences")
        await one.resize(200)
        assert "first 0 · reflection 1 · second 1" in one.text and "6 tokens" in one.text


async def test_a_run_that_grows(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "run", steps=1)
    async with looking(folder.path, tmp_path, count=4) as one:
        rows = one.app.screen.query_one(RowsView)
        await one.press("j", "j")
        chosen = rows.row
        assert chosen is not None
        write_step(RunFolder(folder.path), "run", 1, groups=2, rollouts=2, says="anew")
        await one.wait(lambda: "8 experiences" in one.text)
        assert rows.chosen == 6 and rows.row is not None and rows.row.experience_id == chosen.experience_id
        await one.filter("anew", "2 experiences")


async def test_a_hundred_thousand_experiences(tmp_path: Path) -> None:
    """Keys wait for no query, and only pages that are seen are read."""
    folder = write_run(tmp_path, "run", steps=1)
    index = ExperienceIndex(tmp_path / "index.sqlite")
    index.add_step("run", 0, folder.journal / "000000.msgpack")
    copied = "environment, task_id, algorithm, roles, rewards, outcome, reward, gain, turns, tokens, memory"
    steps = "WITH RECURSIVE steps (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM steps WHERE n < 25000)"
    name = "'run-s' || n || '-t' || slot || '-r' || rollout"
    columns = "run, step, slot, rollout, experience_id"
    index._writer.execute(
        f"INSERT INTO experiences ({columns}, {copied}) {steps} SELECT run, n, slot, rollout, {name}, {copied} "
        "FROM steps, experiences WHERE step = 0"
    )
    facts = (
        "SELECT id, step, slot, rollout, reward, (SELECT id FROM codes WHERE value = roles), 0, 0 FROM experiences "
        "WHERE step > 0 ORDER BY step"
    )
    by_step = itertools.groupby(index._writer.execute(facts).fetchall(), key=lambda row: row[1])
    files = [("run", step, packed(list(rows))) for step, rows in by_step]
    index._writer.execute("BEGIN")
    index._writer.executemany("INSERT INTO files (run, step, facts) VALUES (?, ?, ?)", files)
    index._writer.execute("COMMIT")
    index.close()
    async with looking(folder.path, tmp_path, count=100_004) as one:
        rows = one.app.screen.query_one(RowsView)
        began = time.monotonic()
        await one.press("end")
        assert rows.chosen == 100_003
        await one.press(*["k"] * 20)
        assert time.monotonic() - began < 5
        await one.wait(lambda: rows.row is not None)
        assert rows.row is not None and rows.row.step == 5 and len(rows._pages) < 10
        await one.press("home", until="25000 train/00000")
        await one.filter("step=17", "4 experiences")


async def test_colours_are_the_terminals_own_at_first(folder: Path, tmp_path: Path) -> None:
    async with looking(folder, tmp_path, count=18) as one:
        themes = [one.app.theme]
        for _ in THEMES:
            await one.press("t", until="18 experiences")
            themes.append(one.app.theme)
        assert themes == [*THEMES, THEMES[0]] and one.app.native_ansi_color


def test_warnings_do_not_write_across_the_screen(capfd: pytest.CaptureFixture[str]) -> None:
    log = structlog.get_logger()
    with warnings_kept() as found:
        for number in itertools.chain([1, 1], range(2, 100)):
            log.warning("damaged", place=number)
    assert found[:2] == ["damaged: place 1", "damaged: place 2"] and len(found) == 20
    assert capfd.readouterr() == ("", "")
