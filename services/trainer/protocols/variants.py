"""Whether the policy depends on how a question is put: it answers each as it is and in fresh versions of it.

The operators that make the versions: `order` permutes the choices, `paraphrase` has the question said in other words,
`length` puts sentences before it that mean nothing, `format` lays it out in another way. The seed of the evaluation and
the task decide how.

- `accuracy_original`, `accuracy_OPERATOR`, and `accuracy` over all versions;
- `spread`: the largest of these accuracies less the smallest, `accuracy` aside;
- `consistency`: the share of pairs of versions of a question in which the environment read the same answer;
- `unusable`: the share of questions for which no paraphrase was usable in three tries; they are left out of it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from statistics import fmean

from pydantic import Field

from mulligan.common.experience import Sample
from mulligan.common.tasks import gather_or_cancel
from mulligan.common.types import EnvironmentInfo, Outcome, TaskInfo
from mulligan.trainer.player import Player
from mulligan.trainer.protocols import WritingSettings
from mulligan.trainer.seeds import derive_seed
from mulligan.trainer.texts import fill

TRIES = 3  # at a paraphrase
_CHOICE = re.compile(r"([A-Z])\. (.*)")
_LABEL = re.compile(r"(?<![A-Za-z0-9])([A-Za-z])(?=\)?(?:[.):,}<*]|\s*$))", re.MULTILINE)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


class Operator(StrEnum):
    ORDER = "order"
    PARAPHRASE = "paraphrase"
    LENGTH = "length"
    FORMAT = "format"


class Settings(WritingSettings):
    """`instruction` asks for a paraphrase of `{text}`. `sentences` is how many `length` puts before a question."""

    name: str = "variants"
    operators: tuple[Operator, ...] = Field(tuple(Operator), min_length=1, max_length=16)
    temperature: float = Field(0.0, ge=0)
    paraphrase_temperature: float = Field(0.7, gt=0)
    sentences: int = Field(3, ge=1, le=1000)
    instruction: str = (
        "Say the following in other words. Keep its meaning, all numbers and names, and lines that begin with a letter "
        "and a full stop. Answer with the new text alone.\n\n{text}"
    )

    @property
    def attempts_per_sample(self) -> int:
        return 1 + len(self.operators)  # the question as it is, and its versions


@dataclass(frozen=True)
class Version:
    """`text` is shown in place of the first observation; `said` turns an answer into one to the original."""

    operator: str
    text: str
    said: Callable[[str], str] | None = None


def lacks(environment: EnvironmentInfo, tasks: Sequence[TaskInfo], settings: Settings) -> str:
    if not environment.deterministic:
        return "it is not deterministic, and may show another question each time"
    if Operator.ORDER in settings.operators and not any(_choice_count(task) > 1 for task in tasks):
        return "no test task has the tag 'choices', which the operator 'order' permutes; leave it out of `operators`"
    return ""


async def run(player: Player, tasks: Sequence[TaskInfo], settings: Settings) -> dict[str, float]:
    found = await player.each(tasks, lambda task: _answers(player, task, settings))
    by_version: dict[str, list[bool]] = {}
    for answers in found:
        for operator, sample in answers.items():
            by_version.setdefault(operator, []).append(player.solves(sample))
    accuracy = {operator: fmean(solved) for operator, solved in by_version.items()}
    metrics = {f"accuracy_{operator}": share for operator, share in accuracy.items()}
    if accuracy:
        metrics["accuracy"] = fmean(one for solved in by_version.values() for one in solved)
        metrics["spread"] = max(accuracy.values()) - min(accuracy.values())
    agree = [_read(one) == _read(two) for answers in found for one, two in combinations(answers.values(), 2)]
    if agree:
        metrics["consistency"] = fmean(agree)
    if Operator.PARAPHRASE in settings.operators and by_version.get("original"):
        said = len(by_version.get(Operator.PARAPHRASE, ()))
        metrics["unusable"] = 1 - said / len(by_version["original"])
    return metrics


async def _answers(player: Player, task: TaskInfo, settings: Settings) -> Mapping[str, Sample]:
    """The attempts with a reward at each version of a task; nothing if it cannot be shown."""
    text = await player.observe(task)
    if text is None:
        return {}
    versions = [Version("original", text)]
    for operator in settings.operators:
        randomness = random.Random(derive_seed(player.seed, "variants", operator, task.task_id))
        version = await _version(player, task, operator, text, randomness, settings)
        versions += [version] if version is not None else []
    samples = await gather_or_cancel(
        player.attempt(task, shown=version.text, said=version.said, temperature=settings.temperature)
        for version in versions
    )
    pairs = zip(versions, samples, strict=True)
    return {version.operator: sample for version, sample in pairs if sample.reward is not None}


async def _version(
    player: Player, task: TaskInfo, operator: Operator, text: str, randomness: random.Random, settings: Settings
) -> Version | None:
    """None where the operator does not apply."""
    match operator:
        case Operator.ORDER:
            return permuted(text, _choice_count(task), randomness)
        case Operator.LENGTH:
            return Version(operator, longer(text, settings.sentences, randomness))
        case Operator.FORMAT:
            return Version(operator, laid_out(text, randomness))
    for number in range(TRIES):
        user = fill(settings.instruction, text=text)
        written = await player.write(task, f"paraphrase{number}", user, temperature=settings.paraphrase_temperature)
        if written.outcome is Outcome.COMPLETED and is_paraphrase(written.text, text):
            return Version(operator, written.text.strip())
    return None


def permuted(text: str, count: int, randomness: random.Random) -> Version | None:
    """The choices in another order, under the letters as they were. None unless it ends with `count` choices."""
    lines = text.split("\n")
    places = [place for place, line in enumerate(lines) if _CHOICE.fullmatch(line)][-count:]
    letters = "".join(lines[place][0] for place in places)
    if count < 2 or letters != "".join(chr(ord("A") + number) for number in range(count)):
        return None
    order = list(range(count))
    while order == sorted(order):
        randomness.shuffle(order)
    choices = [lines[place][3:] for place in places]
    for place, letter, chosen in zip(places, letters, order, strict=True):
        lines[place] = f"{letter}. {choices[chosen]}"
    original = {letter: letters[chosen] for letter, chosen in zip(letters, order, strict=True)}

    def said(answer: str) -> str:
        """With the original letters wherever the answer names one as a label, such as `B`, `B.` or `(B)`."""
        return _LABEL.sub(lambda match: original.get(match[1].upper(), match[1]), answer)

    return Version(Operator.ORDER, "\n".join(lines), said)


def longer(text: str, sentences: int, randomness: random.Random) -> str:
    """With sentences before it that change nothing."""
    order = list(_SENTENCES)
    randomness.shuffle(order)
    return " ".join(order[number % len(order)] for number in range(sentences)) + "\n\n" + text


def laid_out(text: str, randomness: random.Random) -> str:
    """The same words in another layout."""
    layouts: Sequence[Callable[[str], str]] = (
        lambda text: f"Question:\n{text}",
        lambda text: "\n".join(f"> {line}" for line in text.split("\n")),
        lambda text: re.sub(r"^([A-Z])\. ", r"(\1) ", f"*** {text}", flags=re.MULTILINE),
    )
    return randomness.choice(layouts)(text)


def is_paraphrase(text: str, original: str) -> bool:
    """Whether it differs and has the same numbers, and the same lines with choices as far as their letters go."""
    differs = text.strip() not in ("", original.strip())
    same_numbers = sorted(_NUMBER.findall(text)) == sorted(_NUMBER.findall(original))
    return differs and same_numbers and _labels(text) == _labels(original)


def _labels(text: str) -> list[str]:
    return [match[1] for line in text.split("\n") if (match := _CHOICE.fullmatch(line))]


def _choice_count(task: TaskInfo) -> int:
    count = task.tags.get("choices", "")
    return int(count) if count.isdecimal() else 0


def _read(sample: Sample) -> list[str]:
    return [turn.action for turn in sample.turns]


_SENTENCES = (
    "This is one question of a collection.",
    "All that is needed is written below.",
    "Please read the whole text before you answer.",
    "There is no hurry.",
    "The questions of the collection do not depend on each other.",
    "Some are easy, and some are not.",
)
