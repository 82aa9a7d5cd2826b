"""Questions in fresh versions: a policy that looks at places, one that reads, one that heeds the layout."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import SamplingParams
from mulligan.trainer.protocols.variants import is_paraphrase, laid_out, longer, permuted
from tests.support.fakes import FakeEnvironment, FakePolicy
from tests.support.measuring import measured

CAT = "Which one is a cat?\nA. tabby\nB. poodle"
DOG = "Which one is a dog?\nA. tabby\nB. poodle"
SUM = "What is 2 + 3?"
ANSWERS = {"cat": "(A)", "dog": "(B)", "sum": "5"}
SHOWS = {"cat": CAT, "dog": DOG, "sum": SUM}
TAGS = {"cat": {"choices": "2"}, "dog": {"choices": "2"}}
ORIGINALS = len(ANSWERS)


def environment(**others: Any) -> FakeEnvironment:
    return FakeEnvironment(ANSWERS, shows=SHOWS, **others)


def first_choice(system: str, last: str, sampling: SamplingParams) -> str:
    return "(A)" if "tabby" in last else "5"


def reads(system: str, last: str, sampling: SamplingParams) -> str:
    if "tabby" not in last:
        return "5"
    wanted = "tabby" if "cat" in last else "poodle"
    (letter,) = re.findall(rf"([AB])[.)] {wanted}", last)
    return f"({letter})"


async def test_a_policy_that_looks_at_places_is_found_out() -> None:
    found = await measured(
        environment(), FakePolicy(first_choice), {"name": "variants", "operators": ["order"]}, tags=TAGS
    )
    assert found.metrics == pytest.approx(
        {
            "variants/accuracy_original": 2 / 3,  # cat, sum
            "variants/accuracy_order": 1 / 2,  # dog; the sum has no choices
            "variants/accuracy": 3 / 5,
            "variants/spread": 2 / 3 - 1 / 2,
            "variants/consistency": 0.0,
        }
    )


async def test_a_policy_that_reads_answers_every_version_alike() -> None:
    operators = ["order", "length", "format"]
    table = {"name": "variants", "operators": operators}
    for seed in range(4):
        found = await measured(environment(), FakePolicy(reads), table, tags=TAGS, seed=seed)
        one = dict.fromkeys(("original", *operators), 1.0)
        expected = {f"variants/accuracy_{operator}": share for operator, share in one.items()}
        assert found.metrics == expected | {
            "variants/accuracy": 1.0,
            "variants/spread": 0.0,
            "variants/consistency": 1.0,
        }


async def test_paraphrases_are_written_by_another_policy_until_one_is_usable() -> None:
    asked: list[str] = []

    def writes(system: str, last: str, sampling: SamplingParams) -> str:
        asked.append(last)
        if "What is" in last:
            return "How much are 2 and 4?"  # never usable: another number
        tries = sum(text == last for text in asked)
        return "What?\nA. tabby" if tries == 1 else last.partition("\n\n")[2].replace("Which one", "Which animal")

    def says(system: str, last: str, sampling: SamplingParams) -> str:
        return "(B)" if "animal" in last else reads(system, last, sampling)

    policy = FakePolicy(says, others={"writer": FakePolicy(writes)})
    table = {"name": "variants", "operators": ["paraphrase"], "writer": "writer"}
    found = await measured(environment(), policy, table)
    assert found.metrics == pytest.approx(
        {
            "variants/accuracy_original": 1.0,
            "variants/accuracy_paraphrase": 1 / 2,
            "variants/accuracy": 4 / 5,
            "variants/spread": 1 / 2,
            "variants/consistency": 1 / 2,
            "variants/unusable": 1 / 3,
        }
    )
    assert len(asked) == 2 * 2 + 3 and all(sampling.temperature == 0.7 for _, sampling in policy.others["writer"].calls)


async def test_versions_come_from_the_seed() -> None:
    async def shown(seed: int) -> list[str]:
        policy = FakePolicy(reads)
        await measured(environment(), policy, {"name": "variants", "operators": ["length", "format"]}, seed=seed)
        return sorted(prompt[-1].content for prompt, _ in policy.calls)

    assert await shown(1) == await shown(1)
    assert len({tuple(await shown(seed)) for seed in range(4)}) == 4


async def test_a_task_that_cannot_be_shown_is_left_out() -> None:
    class Broken(FakeEnvironment):
        async def start(self, environment: str, task_id: str, episode_id: str) -> Any:
            if "-o-" in episode_id and task_id == "cat":
                raise DomainError(Reason.ENVIRONMENT_FAILED, "no")
            return await super().start(environment, task_id, episode_id)

    found = await measured(
        Broken(ANSWERS, shows=SHOWS), FakePolicy(first_choice), {"name": "variants", "operators": ["length"]}
    )
    assert found.metrics["variants/accuracy_length"] == 1 / 2 and found.metrics["variants/excluded"] == 1.0


@pytest.mark.parametrize(
    ("others", "settings", "words"),
    [
        ({"deterministic": False}, {"operators": ["length"]}, "it is not deterministic"),
        ({}, {}, "no test task has the tag 'choices'"),
    ],
)
async def test_an_environment_that_does_not_fit_is_refused(others: Any, settings: Any, words: str) -> None:
    policy = FakePolicy(reads)
    with pytest.raises(DomainError) as caught:
        await measured(environment(**others), policy, {"name": "variants", **settings})
    assert words in caught.value.message and not policy.calls


def test_permuted_choices_and_answers_to_them() -> None:
    text = "A. Pick one:\nA. one\nB. two\nC. three\nThink."
    made = permuted(text, 3, random.Random(0))
    assert made is not None and made.said is not None
    lines = made.text.split("\n")
    assert (lines[0], lines[4]) == ("A. Pick one:", "Think.") and sorted(line[3:] for line in lines[1:4]) == [
        "one",
        "three",
        "two",
    ]
    shown = {line[3:]: line[0] for line in lines[1:4]}
    original = {"one": "A", "two": "B", "three": "C"}
    for choice, letter in shown.items():
        for answer in ("{}", "{}.", "({})", "\\boxed{{{}}}", "<answer>{}</answer>", "So it is {}.\n\n**{}**"):
            assert made.said(answer.replace("{}", letter)) == answer.replace("{}", original[choice])
        assert made.said(letter.lower()) == original[choice]
    assert made.said("A word, a cat, D.") == "A word, a cat, D."
    assert permuted(text, 4, random.Random(0)) is None and permuted("What?", 0, random.Random(0)) is None


def test_length_and_format_keep_the_question() -> None:
    for seed in range(12):
        assert longer(CAT, 9, random.Random(seed)).endswith("\n\n" + CAT)
        words = laid_out(CAT, random.Random(seed)).replace("\n", " ").split()
        assert [word.strip("().") for word in words if word not in ("Question:", ">", "***")] == [
            word.strip("().") for word in CAT.split()
        ]


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        ("How much is 3 and 2?", True),
        (SUM, False),
        (f" {SUM}\n", False),
        ("", False),
        ("How much is 2?", False),
        ("How much is 2 and 3?\nA. five", False),
    ],
)
def test_a_paraphrase_differs_and_keeps_numbers_and_choices(text: str, usable: bool) -> None:
    assert is_paraphrase(text, SUM) is usable
