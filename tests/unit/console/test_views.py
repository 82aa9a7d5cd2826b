"""What is shown of an experience, token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mulligan.common.experience import Trained
from mulligan.console.settings import differences, flat
from mulligan.console.tokens import texts_of
from mulligan.console.views import shown, view_of
from mulligan.testing.recorded_runs import experience


def test_each_token_as_the_model_saw_and_learned_it() -> None:
    one = experience("run", 0, 0, 1)
    source = one.samples[0].sample_id
    trained = (
        Trained(source, source, 0, "first", "policy_gradient", 0.5, {"clip": 0.2}, {"advantages": (0.25, -0.5)}),
        Trained("pair", one.samples[2].sample_id, 0, "pairs", "preference", 1.0, others={"rejected": source}),
    )
    view = view_of(replace(one, trained=trained), lambda tokens: [f"<{token}>" for token in tokens])
    assert [(node.sample.role, node.depth) for node in view.nodes] == [("first", 0), ("reflection", 1), ("second", 2)]
    first = view.nodes[0].sequences[0]
    assert [(token.token, token.text, token.kind) for token in first.tokens] == [
        (1, "<1>", "prompt"),
        (2, "<2>", "prompt"),
        (3, "<3>", "prompt"),
        (5, "<5>", "sampled"),
        (6, "<6>", "sampled"),
    ]
    told = [(token.log_prob, token.version, token.trained, token.values) for token in first.tokens[2:]]
    assert told == [
        (None, None, False, {}),
        (-0.1, 3, True, {"clip": 0.2, "advantages": 0.25}),
        (-2.0, 3, True, {"clip": 0.2, "advantages": -0.5}),
    ]
    assert first.others == (("rejected", trained[1]),) and first.sampled == 2
    assert not view.nodes[1].sequences[0].trained


def test_control_characters_of_a_token_are_shown() -> None:
    view = view_of(experience("run", 0, 0, 0), lambda tokens: ["\x1b[31m\u202e"] * len(tokens))
    assert {token.text for token in view.nodes[0].sequences[0].tokens} == {"\\x1b[31m\\u202e"}


@pytest.mark.parametrize(
    ("observation", "text", "rows"),
    [
        ("A\tB\nC\tD", "", 2),
        ("blocked\nA B C\nD E F", "blocked", 2),
        ("A B\nC D E", "A B\nC D E", 0),
        ("two words", "two words", 0),
        ("go to\nit now", "go to\nit now", 0),
        ("", "", 0),
    ],
)
def test_boards_are_seen(observation: str, text: str, rows: int) -> None:
    found = shown(observation)
    assert (found.text, len(found.board)) == (text, rows)


def test_tokenizers_that_are_here_and_others() -> None:
    texts = texts_of("embedded")
    assert texts is not None and all(isinstance(text, str) for text in texts([1, 2, 3]))
    assert texts_of("somebody/some-model") is None and texts_of("smollm2-1b") is None


def test_settings_that_differ() -> None:
    one = {"steps": 3, "model": {"source": "embedded"}, "seed": 1}
    other = {"steps": 3, "model": {"source": "smollm2-135m", "lora": {"rank": 8}}, "seed": 1}
    assert flat(one) == {"steps": "3", "model.source": "embedded", "seed": "1"}
    assert differences([one, other]) == [("model.source", ["embedded", "smollm2-135m"]), ("model.lora.rank", ["", "8"])]
