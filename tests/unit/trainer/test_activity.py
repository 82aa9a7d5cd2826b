"""What a run says that it does."""

from __future__ import annotations

from mulligan.trainer.activity import CurrentActivity


def test_it_is_counted_when_it_is_asked_for() -> None:
    current = CurrentActivity()
    assert current.now().doing == ""
    done = [0]
    current.begin("sampling", lambda: (done[0], 4))
    first = current.now()
    done[0] = 5  # groups that were replaced are played, too
    second = current.now()
    assert (first.doing, first.done, first.total) == ("sampling", 0, 4)
    assert (second.done, second.total) == (5, 5)
    assert 0 <= first.seconds <= second.seconds
    current.begin("learning")
    assert (current.now().doing, current.now().total) == ("learning", 0)
