"""Settings of plug-ins on the wire: whatever types somebody's plug-in gives them."""

from __future__ import annotations

import sys
from enum import IntEnum
from math import inf, nan
from types import ModuleType
from typing import Any, Literal

import pytest
from pydantic import create_model

from mulligan.common.errors import DomainError, Reason
from mulligan.trainer.folder import RunFolder
from mulligan.trainer.learner.wire import loss_from_proto, loss_to_proto
from mulligan.trainer.loss_settings import LossSettings
from mulligan.trainer.protocols import ProtocolSettings
from mulligan.trainer.samplers import SamplerSettings
from mulligan.trainer.settings import AlgorithmSettings, RunSettings
from mulligan.trainer.v1.run_config_pb2 import RunConfig
from mulligan.trainer.wire import fill_with, settings_from_proto, settings_to_proto, stored_to_proto, validated

NAME = "outside.plugin"
BASES = {
    "algorithm": AlgorithmSettings,
    "loss": LossSettings,
    "sampler": SamplerSettings,
    "protocol": ProtocolSettings,
}
BIG = 2**60 + 1
Rung = IntEnum("Rung", [("LOW", 1), ("HIGH", 2)])


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module outside of the tree that can be any plug-in, but for its `Settings`."""
    module: Any = ModuleType(NAME)
    module.play = module.train = module.loss = module.choose = module.run = lambda *_: None
    monkeypatch.setitem(sys.modules, NAME, module)
    return module  # type: ignore[no-any-return]


def run_with(outside: Any, kind: str, setting: str, annotation: Any, default: Any, **given: Any) -> RunSettings:
    """A run whose plug-in of the kind has one setting."""
    fields: Any = {"name": (str, NAME), setting: (annotation, default)}
    outside.Settings = create_model("Settings", __base__=BASES[kind], **fields)
    table = {"name": NAME, **given}
    tables = {"evaluation": {"protocols": [table]}} if kind == "protocol" else {kind: table}
    return validated(RunSettings, {"environment": "fake", **tables})


@pytest.mark.parametrize(
    ("kind", "setting", "annotation", "default"),
    [
        ("algorithm", "distillation_loss", str, "kl"),
        ("algorithm", "distillation_loss", str, "RAFT"),
        ("algorithm", "distillation_loss", str, "unspecified"),
        ("algorithm", "first_weight", tuple[float, ...], (1.0, 2.0)),
        ("algorithm", "first_weight", str, "half"),
        ("algorithm", "first_weight", bool | str, True),
        ("algorithm", "distillation_baseline", str, "mean"),
        ("algorithm", "distillation_baseline", Literal[1, 2], 1),
        ("algorithm", "reflection_weight", dict[str, float], {"a": 1.0}),
        ("algorithm", "branch_normalization", dict[str, float], {"a": 1.0}),
        ("algorithm", "optimizer_steps", int, 2**40),
        ("algorithm", "second_weight", int, BIG),
        ("algorithm", "big", int, BIG),
        ("algorithm", "big", int, -(2**70)),
        ("algorithm", "big", dict[str, tuple[int, ...]], {"a": (1, BIG)}),
        ("algorithm", "rung", Literal[1, 2], 2),
        ("algorithm", "rung", Rung, Rung.HIGH),
        ("algorithm", "seen", frozenset[str], frozenset("a")),
        ("loss", "clip_low", tuple[float, float], (0.1, 0.2)),
        ("loss", "reference_every", str, "never"),
        ("sampler", "shares", tuple[float, ...], (0.1, 0.2)),
        ("sampler", "seed", int, BIG),
        ("protocol", "seed", int, BIG),
    ],
)
def test_a_setting_crosses_the_wire_whatever_its_type(
    outside: ModuleType, kind: str, setting: str, annotation: Any, default: Any
) -> None:
    run = run_with(outside, kind, setting, annotation, default)
    sent = RunConfig.FromString(settings_to_proto(run).SerializeToString())
    got = settings_from_proto(sent)
    assert got == run and got.model_dump(mode="json") == run.model_dump(mode="json")
    stored = stored_to_proto(run.model_dump(mode="json"))
    assert settings_from_proto(stored) == run, "a run's folder has them, too"
    if kind == "loss":
        assert loss_from_proto(loss_to_proto(run.loss)) == run.loss, "the learner gets them as well"


@pytest.mark.parametrize(
    ("kind", "setting", "annotation", "default", "given"),
    [
        ("algorithm", "first_weight", float | None, 2.0, None),
        ("algorithm", "temperature", float | None, 2.0, None),
        ("algorithm", "memory_mix", tuple[Any, ...], ("a",), ()),
        ("algorithm", "distillation_loss", Literal["unspecified", "raft"], "raft", "unspecified"),
        ("loss", "clip_low", float | None, 0.2, None),
        ("sampler", "turns", int | None, 3, None),
        ("protocol", "label", str | None, "one", None),
    ],
)
def test_nothing_crosses_the_wire_where_it_is_not_the_default(
    outside: ModuleType, kind: str, setting: str, annotation: Any, default: Any, given: Any
) -> None:
    run = run_with(outside, kind, setting, annotation, default, **{setting: given})
    assert settings_from_proto(settings_to_proto(run)) == run
    if kind == "loss":
        assert loss_from_proto(loss_to_proto(run.loss)) == run.loss
    if kind == "protocol":
        alone = RunConfig(environment="fake")
        fill_with(alone.evaluation, run.evaluation)
        assert settings_from_proto(alone).evaluation == run.evaluation


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("algorithm", "settings"),
        ("algorithm", "second_attempt"),
        ("loss", "settings"),
        ("sampler", "settings"),
        ("protocol", "settings"),
    ],
)
def test_a_plugin_with_a_setting_that_the_wire_uses_otherwise_is_refused(
    outside: ModuleType, kind: str, setting: str
) -> None:
    with pytest.raises(DomainError, match=f"{NAME}' is no {kind}: '{setting}' cannot be the name of a setting") as told:
        run_with(outside, kind, setting, dict[str, float], {"a": 1.0})
    place = "evaluation.protocols[0]" if kind == "protocol" else kind
    assert (told.value.reason, told.value.metadata["field"]) == (Reason.INVALID_SETTING, f"{place}.name")


@pytest.mark.parametrize("number", [inf, -inf, nan])
@pytest.mark.parametrize(
    ("field", "within"),
    [("settings", "depths[1]"), ("advantage_settings", "advantage_settings.depths[1]")],
)
def test_a_number_that_is_not_finite_is_refused_by_name(field: str, within: str, number: float) -> None:
    config = RunConfig(environment="fake")
    getattr(config.algorithm, field)["depths"] = [1.0, number]
    with pytest.raises(DomainError) as told:
        settings_from_proto(config)
    assert told.value.reason is Reason.INVALID_SETTING
    assert told.value.message == f"algorithm.{within}: expected a finite number"


def test_a_run_of_great_numbers_is_stored(outside: ModuleType, tmp_path: Any) -> None:
    run = run_with(outside, "algorithm", "big", int, 2**70)
    RunFolder(tmp_path / "r").create("r", run)
    assert RunFolder(tmp_path / "r").settings() == run
