"""`mulligan env play`: a person plays an environment as an agent does, in the terminal or from a pipe."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any, Protocol
from uuid import uuid4

import typer

from mulligan.cli.connection import endpoint, said
from mulligan.cli.out import fail, note, show
from mulligan.cli.overrides import read_overrides
from mulligan.common.channel import Endpoint
from mulligan.common.errors import CallFailed, DomainError, ServiceUnavailable
from mulligan.common.rewards import total
from mulligan.common.tasks import LoopThread
from mulligan.common.types import EnvironmentInfo, EpisodeStep, Outcome, Split
from mulligan.env import calls
from mulligan.env.base import Environment, Episode, UnknownTask, close
from mulligan.env.client import EnvClient, RemoteEpisode
from mulligan.env.config import EnvSettings

_HELP = """\
:prompt   what an agent is told before it begins
:tools    what it may call
:restart  the same task from its beginning
:quit     leave; so do Ctrl-D and Ctrl-C
Anything else is an answer. One that begins with a command's name: put a blank before it."""


def play(
    name: Annotated[str, typer.Argument(help="A kind, a name in the service's settings, or with --target a server's.")],
    target: Annotated[str, typer.Option("--target", "-t", help="HOST:PORT of a server; without it, here.")] = "",
    task: Annotated[str, typer.Option(help="A task's id; the first of the split when left out.")] = "",
    split: Annotated[Split, typer.Option(help="train or test.")] = Split.TRAIN,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the environment as NAME=VALUE; repeatable.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The service's settings, with tables [environments.NAME].", dir_okay=False)
    ] = None,
    end: Annotated[
        str, typer.Option("--end", metavar="MARK", help="Answers of several lines: each ends with a line that is MARK.")
    ] = "",
    prompt: Annotated[bool, typer.Option("--prompt", help="Begin with what an agent is told.")] = False,
) -> None:
    """Play an environment. A line is an answer; `:help` lists what else there is.

    Exit status: 0 the episode is over or was left, 1 it failed, 2 there is no such environment.

    Example: `mulligan env play frozenlake --split test --set size_max=4`
    """
    if target and (override or config):
        fail("--set and --config make an environment here; they do not go with --target", 2)
    table: Table | None = None
    try:
        table = _There(target, name) if target else _Here(name, read_overrides(override or []), config)
        _Play(table, task, split, _reader(end)).run(tell_prompt=prompt)
    except KeyboardInterrupt:
        show("\nleft")
        sys.exit(130)
    except (DomainError, CallFailed, ServiceUnavailable) as error:
        fail(said(error))
    finally:
        if table is not None:
            table.close()


class Table(Protocol):
    """An environment in which episodes are played one after the other."""

    info: EnvironmentInfo

    def first_task(self, split: Split) -> str:
        """Empty when there is none."""

    def start(self, task_id: str) -> tuple[str, int]:
        """Ends the last episode and starts one. Returns the observation and whose turn it is.

        Raises DomainError for an unknown task.
        """

    def step(self, action: str) -> EpisodeStep: ...

    def kept_alive(self) -> AbstractContextManager[None]:
        """The episode does not expire within the block, however long it takes."""

    def close(self) -> None: ...


class _Here:
    """An environment in this process."""

    def __init__(self, name: str, overrides: dict[str, Any], config: Path | None) -> None:
        named = EnvSettings.load(["--config", str(config)] if config else []).environments
        shown = name if name in named else name.rpartition(".")[2]
        table = {**named.get(name, {"kind": name}), **overrides}
        try:
            made = EnvSettings(environments={shown: table}).create_environments()
        except ValueError as error:
            fail(error, 2)
        self._environment: Environment = made[shown]
        self._episode: Episode | None = None
        self.info = self._environment.info

    def first_task(self, split: Split) -> str:
        tasks = self._environment.list_tasks(split, 0, 1)
        return tasks[0].task_id if tasks else ""

    def start(self, task_id: str) -> tuple[str, int]:
        self._end()
        try:
            self._episode, begun = calls.begin(self._environment, task_id)
        except UnknownTask as error:
            raise calls.start_error(self.info.name, task_id, error, "") from error
        return begun.observation, begun.player

    def step(self, action: str) -> EpisodeStep:
        assert self._episode is not None
        try:
            return calls.play(self._episode, action, self.info.player_count)
        except Exception as error:  # noqa: BLE001 - its author sees what it raises, whatever that is
            note(traceback.format_exc())
            return calls.failed_step(error, calls.described(error))

    def kept_alive(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        self._end()
        close(self._environment)

    def _end(self) -> None:
        if self._episode is not None:
            close(self._episode)
            self._episode = None


class _There:
    """An environment of a server. The client has an event loop of its own, which goes on while a person thinks."""

    def __init__(self, address: str, name: str) -> None:
        server = endpoint(address)
        self._loop = LoopThread("client")
        self._client = self._loop.run(self._connect(server))
        self._episode: RemoteEpisode | None = None
        self._episode_id = ""  # set before the start, so that an interrupted start is ended, too
        try:
            self.info = self._loop.run(self._client.describe(name))
        except BaseException:
            self.close()
            raise

    def first_task(self, split: Split) -> str:
        tasks = self._loop.run(self._client.list_tasks(self.info.name, split, 1))
        return tasks[0].task_id if tasks else ""

    def start(self, task_id: str) -> tuple[str, int]:
        self._end()
        self._episode_id = str(uuid4())
        self._episode = self._loop.run(self._client.start(self.info.name, task_id, self._episode_id))
        return self._episode.observation, self._episode.player

    def step(self, action: str) -> EpisodeStep:
        assert self._episode is not None
        return self._loop.run(self._episode.step(action))

    @contextmanager
    def kept_alive(self) -> Iterator[None]:
        assert self._episode is not None
        renewing = self._episode.kept_alive()
        self._loop.run(renewing.__aenter__())
        try:
            yield
        finally:
            self._loop.run(renewing.__aexit__(None, None, None))

    def close(self) -> None:
        with suppress(DomainError, CallFailed, ServiceUnavailable):  # it is gone already, or expires in time
            self._end()
        self._loop.run(self._client.close())
        self._loop.close()

    def _end(self) -> None:
        episode = self._episode
        self._episode = None
        episode_id = self._episode_id
        self._episode_id = ""
        if episode_id:
            self._loop.run(episode.end() if episode is not None else self._client.end(episode_id))

    @staticmethod
    async def _connect(server: Endpoint) -> EnvClient:
        return EnvClient(server)


class _Play:
    """Plays one task. `read` returns the next answer, or None at the end of the input."""

    def __init__(self, table: Table, task: str, split: Split, read: Callable[[], str | None]) -> None:
        self._table = table
        self._info = table.info
        self._read = read
        if self._info.unavailable:
            fail(f"{self._info.name}: {self._info.unavailable}")
        self._task = task or table.first_task(split)
        if not self._task:
            fail(f"{self._info.name} has no task in {split}")
        self._steps = 0
        self._gained: list[list[float]] = []  # of each player

    def run(self, *, tell_prompt: bool) -> None:
        info = self._info
        show(f"{info.name}: {info.description}")
        show(f"task {self._task}, at most {info.max_steps} steps, reward at most {info.max_reward:g}")
        if tell_prompt:
            self._obey(":prompt")
        self._begin()
        while True:
            with self._table.kept_alive():
                answer = self._read()
            if answer is None or answer.strip() == ":quit":
                show(f"\nleft after {self._steps} steps, reward {self._sum()}")
                return
            if not self._obey(answer) and self._step(answer):
                return

    def _begin(self) -> None:
        self._steps = 0
        self._gained = [[] for _ in range(self._info.player_count)]
        observation, player = self._table.start(self._task)
        self._show(observation, player)

    def _obey(self, command: str) -> bool:
        """Carries out a command. False if the text is none."""
        match command.rstrip():
            case ":help":
                show(_HELP)
            case ":prompt":
                show(f"\n{self._info.prompts.solver}")
            case ":tools":
                lines = (f"{tool.name}: {tool.description}\n  {tool.parameters}" for tool in self._info.tools)
                show("\n".join(lines) or "none")
            case ":restart":
                show("\nfrom the beginning:")
                self._begin()
            case _:
                return False
        return True

    def _step(self, answer: str) -> bool:
        """Plays an answer. Returns whether the episode is over. Ends the program if the environment failed."""
        step = self._table.step(answer)
        self._steps += 1
        if step.outcome not in (None, Outcome.COMPLETED, Outcome.TRUNCATED):
            fail(f"{step.outcome}: {step.error}")
        reward = step.reward or 0.0
        for gained, one in zip(self._gained, step.rewards or (reward,), strict=False):
            gained.append(one)
        gains = f", reward {reward:g}" if reward else ""
        show(f"\nstep {self._steps}, read as: {step.action}{gains}")
        self._show(step.observation, step.player, step.tool, over=step.done)
        if step.done:
            show(f"\n{step.outcome} after {self._steps} steps, reward {self._sum()}")
            if step.feedback:
                show(f"feedback: {step.feedback}")
        return step.done

    def _show(self, observation: str, player: int, tool: str = "", *, over: bool = False) -> None:
        speaker = f"{tool} answers:\n" if tool else ""
        show(f"\n{speaker + observation}")
        if self._info.player_count > 1 and not over:
            show(f"\nplayer {player}'s turn")

    def _sum(self) -> str:
        if self._info.player_count == 1:
            return f"{total(self._gained[0]):g}"
        return ", ".join(f"{total(rewards):g} for player {player}" for player, rewards in enumerate(self._gained))


def _reader(end: str) -> Callable[[], str | None]:
    """Reads answers from standard input; on a terminal with a prompt."""
    asks = sys.stdin.isatty()

    def line(mark: str) -> str | None:
        sys.stdout.flush()
        try:
            return input(mark if asks else "")
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            fail(f"the answer is not UTF-8: {error}")

    def read() -> str | None:
        first = line("> ")
        if not end or first is None or first.startswith(":"):
            return first
        lines: list[str] = []
        following: str | None = first
        while following is not None and following != end:
            lines.append(following)
            following = line("… ")
        return "\n".join(lines)

    return read
