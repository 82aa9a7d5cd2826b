"""What a run says that it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from mulligan.trainer.activity import CallsOfLearner, Count, CurrentActivity, no_parts
from mulligan.trainer.data import Datum, Distillation
from tests.support.fakes import FakeLearner, FakePolicy
from tests.unit.trainer.test_run import World


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


def test_what_has_no_parts_is_measured_by_the_time_that_it_took_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("mulligan.trainer.activity.time.monotonic", lambda: now[0])
    current = CurrentActivity()
    for doing, lasts in (("saving", 40.0), ("publishing", 0.5), ("saving", 10.0)):
        current.begin(doing)
        now[0] += lasts
    found = current.now()
    assert (found.doing, found.done, found.total, found.seconds) == ("saving, seconds", 10, 40, 10.0)
    now[0] += 50.0
    assert (current.now().done, current.now().total) == (60, 60), "it takes longer this time"
    current.begin("publishing")
    assert (current.now().doing, current.now().total) == ("publishing", 0), "it is over at once"
    current.begin("saving")
    now[0] += 6.0
    assert (current.now().done, current.now().total) == (6, 60), "as it was the last time"


async def test_a_run_says_all_that_it_does(tmp_path: Path) -> None:
    world = World(tmp_path, deterministic=False, policies={"evaluator": "second"}, algorithm={"optimizer_steps": 2})
    world.policy.others["second"] = FakePolicy(lambda system, last, sampling: "go")
    run = world.run()
    told: list[tuple[str, int]] = []

    def telling(current: CurrentActivity, prefix: str) -> None:
        inner = current.begin

        def begin(doing: str, count: Count = no_parts) -> None:
            inner(doing, count)
            told.append((prefix + doing, current.now().total))

        current.begin = begin  # type: ignore[method-assign]

    telling(run.activity, "")
    telling(run.beside, "beside it ")
    await run.train()
    doing = [one for one, _ in told]
    step = ["sampling chains", "learning", "computing the log-probabilities of tokens", "learning tokens"]
    step += ["publishing the weights", "writing to the memory"]
    first = doing.index("sampling chains")
    assert [one for one in doing[first:] if not one.startswith("beside it")][: len(step)] == step
    assert {"saving a checkpoint", "beside it evaluating attempts", "beside it "} <= set(doing)
    assert "evaluating attempts" not in doing
    assert all(total for one, total in told if one.endswith("tokens"))
    assert run.activity.now().doing == run.beside.now().doing == ""


def test_tokens_of_several_calls_of_a_learner_are_counted() -> None:
    data = [
        Datum(str(n), tuple(range(n)), (False,) + (True,) * (n - 1), 1.0, 1.0, Distillation(1.0), "")
        for n in (4, 6, 10)
    ]
    learner = FakeLearner()
    calls = CallsOfLearner(learner, 20)
    learner.share_done = 1.0  # of some call before
    assert calls.count() == (0, 20)
    learner.share_done = 0.0
    with calls.call(data[:2]):
        learner.share_done = 0.5
        assert calls.count() == (5, 20)
        learner.share_done = 1.0
    assert calls.count() == (10, 20)
    learner.share_done = 0.0
    with calls.call(data[2:]):
        learner.share_done = 0.1
        assert calls.count() == (11, 20)
        learner.share_done = 1.0
    assert calls.count() == (20, 20)
