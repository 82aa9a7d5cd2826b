"""An algorithm, an estimator, a sampler and a protocol of an installed package, in one run: by the names of their entry
points, which are modules or objects, and by module path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.errors import DomainError
from mulligan.trainer.folder import RunFolder
from mulligan.trainer.journal import StepJournal, journal_file, read_experiences
from mulligan.trainer.manager import RunManager
from mulligan.trainer.run import ServicePorts
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.wire import settings_from_proto, settings_to_proto, validated
from tests.support.distribution import install
from tests.support.fakes import FakeEnvironment, FakeLearner, FakeMemory, FakePolicy
from tests.support.waiting import until


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(install(tmp_path / "installed")))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "acme"]:
        del sys.modules[name]


def settings(form: str, **further: Any) -> RunSettings:
    """The run with the four of them; `form` is how each is named."""
    plain = {
        "environment": "fake",
        "algorithm": {"name": form.format("persistent"), "advantage": form.format("halved"), "plays": 3},
        "sampler": {"name": form.format("backwards")},
        "evaluation": {"samples": 1, "protocols": [{"name": form.format("ever"), "label": "ever", "attempts": 3}]},
        "rollout": {"tasks_per_step": 2, "rollouts_per_task": 2},
        "steps": 1,
        "loss": {"kl_coefficient": 0.0},
    }
    return validated(RunSettings, plain | further)


def says(system: str, last: str, sampling: Any) -> str:
    return "go" if sampling.seed % 2 else "no"


async def trained(folder: Path, run: RunSettings) -> tuple[RunFolder, FakeLearner]:
    learner = FakeLearner()

    async def open_learner(run_id: str, settings: RunSettings) -> FakeLearner:
        return learner

    environment = FakeEnvironment({f"t{number}": "go" for number in range(4)})
    manager = RunManager(folder, ServicePorts(environment, FakePolicy(says), FakeMemory(), open_learner))
    started = manager.start("run", run)
    await until(lambda: str(manager.record("run").state) != "running")
    assert manager.record("run").error == "" and str(manager.record("run").state) == "completed"
    found = {name for one in started.events.entries for name in getattr(one.event, "metrics", {})}
    assert {"ever/solved", "success_play"} <= found
    await manager.close()
    return started.folder, learner


@pytest.mark.parametrize("form", ["{}", "{}-object", "acme.{}"])
async def test_a_run_of_plugins_of_an_installed_package(form: str, tmp_path: Path) -> None:
    run = settings(form)
    assert settings_from_proto(settings_to_proto(run)) == run and run.algorithm.name == form.format("persistent")
    folder, learner = await trained(tmp_path / "runs", run)
    assert folder.settings() == run, "a restart reads them"
    journal = StepJournal(folder.journal, 0)
    journal.close()
    assert journal.started is not None and journal.started.task_ids == ["t3", "t2"]
    read = read_experiences(journal_file(folder.journal, 0))
    assert {one.algorithm for one in read} == {form.format("persistent")}
    values = {(one.samples[-1].reward, value) for one in read for value in one.trained[0].values["advantages"]}
    assert values <= {(1.0, 0.5), (0.0, 0.0)} and (1.0, 0.5) in values
    assert len(learner.steps) == 1


@pytest.mark.parametrize(
    ("table", "field", "words"),
    [
        ({"algorithm": {"name": "persistant"}}, "algorithm.name", "did you mean 'persistent'?"),
        ({"algorithm": {"name": "persistent", "play": 3}}, "algorithm.play", "did you mean 'plays'?"),
        ({"algorithm": {"advantage": "halfed"}}, "algorithm.advantage", "did you mean 'halved'?"),
        ({"sampler": {"name": "backward"}}, "sampler.name", "did you mean 'backwards'?"),
        (
            {"evaluation": {"protocols": [{"name": "evr"}]}},
            "evaluation.protocols[0].name",
            "did you mean 'ever'?",
        ),
    ],
)
def test_their_names_are_among_the_near_ones(table: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(DomainError) as told:
        settings("{}", **table)
    assert told.value.metadata["field"] == field and words in told.value.message
