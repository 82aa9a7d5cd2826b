"""HotpotQA (https://hotpotqa.github.io): questions that take facts from several passages, with a search to find them.

As published with ERL (arXiv 2602.13949): one tool, `local_search`, with the five best passages, each cut to 300
characters; at most five turns; the final answer in a box; reward 1 for an exact match, else F1 from 0.3 on. Without
files it plays the small data set of `world.py`. Deviations from the reference code:
1. Only a box, or what stands between <answer> and </answer>, is an answer (the reference guesses one from bold text,
   dates, names or the first sentence).
2. The last box counts, not the first.
3. The agent is told the true number of turns.
4. A search that fails is ENV_ERROR or TIMEOUT, and the attempt is excluded (the reference: reward 0).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, Field

from mulligan.common.rewards import reaches
from mulligan.env.answers import marked
from mulligan.env.base import (
    EnvironmentInfo,
    MissingExtra,
    PromptSet,
    Split,
    StepResult,
    TaskInfo,
    Tool,
    UnknownTask,
)
from mulligan.env.encoders import ENCODERS
from mulligan.env.envs.hotpotqa.score import Method, Score, score
from mulligan.env.search import Bm25, Dense, Hit, Index, kept_bm25, kept_dense, load_encoder
from mulligan.env.tool_calls import Call, describe, find_calls, printable, read_arguments

OVER = "The episode is over."
NOTHING_FOUND = "No relevant passages were found."
_SHOWN = 200  # characters of a query or an answer in readings and feedback


class LocalSearch(BaseModel):
    """Search passages of an encyclopedia for information."""

    query: str = Field(description="What to search for", min_length=1)
    top_k: int = Field(5, description="How many passages to return, at most 5", ge=1)


SEARCH = describe("local_search", LocalSearch)


@dataclass(frozen=True, slots=True)
class Settings:
    """The published task by default. `train_file` and `test_file` are official question files. `corpus` lists more
    files or folders with passages. `index_folder` keeps the index between starts. `train_tasks` and `test_tasks` limit
    the questions; 0 means all. `tools` says what describes the search to the agent: its chat `template`, or the
    `prompt`, for models whose template has no tools."""

    train_file: str = ""
    test_file: str = ""
    corpus: tuple[str, ...] = ()
    index_folder: str = ""
    retriever: str = "bm25"  # or "dense"
    encoder: str = ENCODERS.default  # of dense retrieval
    encoder_settings: dict[str, Any] = field(default_factory=dict)
    results: int = 5
    passage_characters: int = 300
    max_steps: int = 5
    train_tasks: int = 0
    test_tasks: int = 0
    tools: str = "template"
    seed: int = 0  # of the data set that comes along
    name: str = "hotpotqa"

    def __post_init__(self) -> None:
        for setting, number, least in (
            ("results", self.results, 1),
            ("passage_characters", self.passage_characters, 1),
            ("max_steps", self.max_steps, 1),
            ("train_tasks", self.train_tasks, 0),
            ("test_tasks", self.test_tasks, 0),
        ):
            if number < least:
                raise ValueError(f"{setting} must be at least {least}, not {number}")
        if self.retriever not in ("bm25", "dense"):
            raise ValueError(f'retriever must be "bm25" or "dense", not {self.retriever!r}')
        if self.tools not in ("template", "prompt"):
            raise ValueError(f'tools must be "template" or "prompt", not {self.tools!r}')
        if self.corpus and not (self.train_file or self.test_file):
            raise ValueError("corpus needs a train_file or a test_file: it has no questions")
        if not self.name:
            raise ValueError("name must not be empty")


class Asked(Protocol):
    @property
    def question(self) -> str: ...

    @property
    def answer(self) -> str: ...

    @property
    def difficulty(self) -> float: ...


class HotpotQaEpisode:
    def __init__(self, question: Asked, index: Index, settings: Settings) -> None:
        self.observation = question.question
        self._gold = question.answer
        self._index = index
        self._settings = settings
        self._steps = 0

    def step(self, action: str) -> StepResult:
        self._steps += 1
        calls = find_calls(action, (SEARCH.name,))
        is_last = self._steps >= self._settings.max_steps
        if calls and not is_last:
            return self._answer_calls(calls)
        result = score(marked(action), self._gold)
        truncated = bool(calls) and result.method is Method.NO_ANSWER
        reading = _reading(calls) if truncated else _answer_reading(result)
        feedback = _feedback(result, truncated)
        return StepResult(OVER, reading, result.reward, done=True, truncated=truncated, feedback=feedback)

    def fork(self) -> HotpotQaEpisode:
        return copy(self)  # with the same index, which only reads

    def _answer_calls(self, calls: Sequence[Call]) -> StepResult:
        """Answers every call of the turn. If none can be read, the user message says what is wrong."""
        answers = [self._answer(call) for call in calls]
        searched = any(found for found, _ in answers)
        text = "\n\n".join(text for _, text in answers)
        is_tool = searched and self._settings.tools == "template"
        return StepResult(text, _reading(calls), tool=SEARCH.name if is_tool else "")

    def _answer(self, call: Call) -> tuple[bool, str]:
        """Whether a search was made, and its result or the problem with the call."""
        if call.problem:
            return False, f"The tool call could not be read: {call.problem}."
        if call.name != SEARCH.name:
            return False, f"There is no tool {printable(call.name, _SHOWN)!r}; there is: {SEARCH.name}."
        try:
            wanted = read_arguments(LocalSearch, call.arguments)
        except ValueError as problem:
            return False, f"The arguments of {SEARCH.name} are wrong: {problem}."
        hits = self._index.search(wanted.query, min(wanted.top_k, self._settings.results))
        return True, self._show(hits)

    def _show(self, hits: Sequence[Hit]) -> str:
        limit = self._settings.passage_characters
        texts = (
            f"[Document {number}] {hit.passage.title} (score {hit.score:.3f})\n"
            + (hit.passage.text if len(hit.passage.text) <= limit else hit.passage.text[:limit] + "...")
            for number, hit in enumerate(hits, start=1)
        )
        return "\n\n".join(texts) or NOTHING_FOUND


class HotpotQa:
    """`questions` are those of each split by id. `index` finds passages."""

    def __init__(self, questions: Mapping[Split, Mapping[str, Asked]], index: Index, settings: Settings) -> None:
        self._questions = {f"{split}/{id_}": one for split in Split for id_, one in questions[split].items()}
        self._ids = {split: [f"{split}/{id_}" for id_ in questions[split]] for split in Split}
        self._index = index
        self.settings = settings
        in_template = settings.tools == "template"
        self.info = EnvironmentInfo(
            name=settings.name,
            description=f"HotpotQA, {settings.retriever} search, {settings.max_steps} turns",
            prompts=_prompts(settings.max_steps, () if in_template else (SEARCH,)),
            max_steps=settings.max_steps,
            max_reward=1.0,
            deterministic=True,
            task_counts={split: len(ids) for split, ids in self._ids.items()},
            tools=(SEARCH,) if in_template else (),
            can_fork=True,
        )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        first = max(offset, 0)
        ids = self._ids[split][first : first + max(limit, 0)]
        return [TaskInfo(task_id, split, self._questions[task_id].difficulty) for task_id in ids]

    def start(self, task_id: str) -> HotpotQaEpisode:
        if task_id not in self._questions:
            raise UnknownTask(f"{task_id[:80]!r} is not a task of {self.info.name}")
        return HotpotQaEpisode(self._questions[task_id], self._index, self.settings)


def create(name: str, settings: Settings) -> HotpotQa:
    """Reads the questions, and builds the index or opens one that was kept."""
    settings = replace(settings, name=name)
    try:
        import tantivy  # noqa: F401 - what `search` uses

        from mulligan.env.envs.hotpotqa.data import Files, Question, by_id
    except ImportError as error:
        raise MissingExtra("hotpotqa", error) from error
    if settings.train_file or settings.test_file:
        files = Files(settings.train_file, settings.test_file, settings.corpus)
        files.check()
        train = files.questions(settings.train_file, settings.train_tasks)
        test = files.questions(settings.test_file, settings.test_tasks)
        passages: Iterable[tuple[str, str]] = files.passages()
        content = files.fingerprint() if settings.index_folder else ""
    else:
        import msgspec

        from mulligan.env.envs.hotpotqa import world

        made = msgspec.convert(world.data_sets(settings.seed), tuple[tuple[Question, ...], tuple[Question, ...]])
        train = made[0][: settings.train_tasks or None]
        test = made[1][: settings.test_tasks or None]
        passages = world.passages(settings.seed)
        content = f"world {settings.seed}"
    questions = {Split.TRAIN: by_id(train, without=test), Split.TEST: by_id(test)}
    return HotpotQa(questions, _index(settings, passages, content), settings)


def _index(settings: Settings, passages: Iterable[tuple[str, str]], content: str) -> Index:
    folder = Path(settings.index_folder) if settings.index_folder else None
    if settings.retriever == "bm25":
        return Bm25.build(passages) if folder is None else kept_bm25(passages, folder, content)
    encoder = load_encoder(settings.encoder, settings.encoder_settings)
    if folder is None:
        return Dense.build(passages, encoder)
    described = json.dumps([settings.encoder, settings.encoder_settings], sort_keys=True, default=str)
    return kept_dense(passages, folder, content, encoder, described)


def _reading(calls: Iterable[Call]) -> str:
    """A turn's calls as a trace shows them."""
    return "; ".join(call.describe(_SHOWN) for call in calls)


def _answer_reading(result: Score) -> str:
    return str(result.method) if result.method is Method.NO_ANSWER else f"answer: {printable(result.answer, _SHOWN)}"


def _feedback(result: Score, truncated: bool) -> str:
    """Status, reward, the answer that was read and how it was scored. Never tells the right answer."""
    if truncated:
        return f"The turns were used up. Reward {result.reward:.2f}. There was no boxed answer."
    if result.method is Method.NO_ANSWER:
        return f"No answer. Reward {result.reward:.2f}. The last turn had neither a readable tool call nor a box."
    status = "Correct" if reaches(result.reward, 1) else "Partly correct" if result.reward > 0 else "Incorrect"
    answer = printable(result.answer, _SHOWN)
    return f"{status}. Reward {result.reward:.2f}. Extracted answer: {answer}. Scored by {result.method}."


_FORMAT = """\
You have at most {max_steps} turns: a search takes one, and so does the answer. A turn without a search is the last. \
Always put your final answer, as short as possible, in \\boxed{}."""

_PROMPTS = PromptSet(
    solver="""\
You are a helpful assistant who answers questions directly and efficiently. Search for what you need to know, then \
answer.

"""
    + _FORMAT,
    action_reminder=_FORMAT,
    reflection_system="""\
You improve the instruction under which an agent answers questions that take facts from several passages. The agent \
can search. The instruction must serve for every question: never mention this one, its subject or an answer to it.""",
    reflection="""\
The attempt: the question, then each of the agent's turns with what it was shown next.

{trace}

Feedback: {feedback}
Reward: {reward}

The instruction that served best so far, which may be wrong:
{memory}

Find out what went wrong: no search, a query that found nothing, facts that no passage supports, a hop left out, an \
answer that is too long or not in a box. Then write one short, reusable instruction between <prompt> and </prompt> \
that makes the agent search whenever the question does not hold the answer, write concise queries, follow up what it \
finds, and not repeat this failure.""",
    memory_empty="(none yet)",
    trace_turn="{observation}\n\nAgent: {action}\n\n",
    retry="""\
You are a helpful assistant who answers questions directly and efficiently. This is your first attempt at the \
question below, which failed; the same question is asked again now, and you should do better.

{trace}

Feedback: {feedback}

"""
    + _FORMAT,
    try_again="""\
You are a helpful assistant who answers questions directly and efficiently. You have attempted this question before, \
and that was wrong. Try again.

"""
    + _FORMAT,
)

_TOLD = """

# Tools

You may call a function to assist with the question. You are provided with function signatures within <tools></tools>:
<tools>
%s
</tools>

For each call, return a JSON object with its name and arguments within <tool_call></tool_call>:
<tool_call>
{"name": <function-name>, "arguments": <arguments-object>}
</tool_call>"""


def _prompts(max_steps: int, told: Sequence[Tool]) -> PromptSet:
    """The prompts, with the true limit, and with the tools if the chat template does not describe them."""
    functions = (
        {"name": tool.name, "description": tool.description, "parameters": json.loads(tool.parameters)} for tool in told
    )
    lines = "\n".join(json.dumps({"type": "function", "function": function}) for function in functions)
    suffix = _TOLD % lines if told else ""

    def complete(text: str) -> str:
        return text.replace("{max_steps}", str(max_steps)) + suffix

    return replace(
        _PROMPTS,
        solver=complete(_PROMPTS.solver),
        action_reminder=complete(_PROMPTS.action_reminder),
        retry=complete(_PROMPTS.retry),
        try_again=complete(_PROMPTS.try_again),
    )
