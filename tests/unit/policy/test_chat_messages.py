"""Which call of a tool an answer belongs to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mulligan.policy.chat_messages import OpenCalls

names = st.sampled_from(["go", "look", "stay"])
steps = st.lists(st.tuples(st.sampled_from(["add", "answer", "answer any"]), names), max_size=40)


@given(steps=steps)
def test_an_answer_is_that_of_the_first_open_call(steps: list[tuple[str, str]]) -> None:
    """As a search through a list of them finds it."""
    subject = OpenCalls()
    open_calls: list[tuple[str, str]] = []
    for number, (step, name) in enumerate(steps):
        if step == "add":
            subject.add(name, str(number))
            open_calls.append((name, str(number)))
            continue
        wanted = [call for call in open_calls if step == "answer any" or call[0] == name]
        expected = wanted[0][1] if wanted else None
        assert subject.answer(name if step == "answer" else None) == expected
        open_calls = [call for call in open_calls if call[1] != expected]
