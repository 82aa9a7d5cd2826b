"""A run's settings are written twice, for people and for the wire. Both say the same: names, values, defaults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import RetrievalStrategy
from mulligan.common.suggest import problems
from mulligan.trainer.advantages import ADVANTAGES
from mulligan.trainer.algorithms import erl
from mulligan.trainer.learner.wire import loss_from_proto
from mulligan.trainer.loss_settings import LossSettings
from mulligan.trainer.loss_terms import KlEstimator, KlReference, MismatchCorrection
from mulligan.trainer.losses import LOSSES, gspo, ppo
from mulligan.trainer.memory_settings import MemoryPartSettings, MemoryReaders
from mulligan.trainer.protocols import PROTOCOLS, ProtocolSettings
from mulligan.trainer.samplers import SAMPLERS, adarft, horizon, mixture, uniform, weakest
from mulligan.trainer.settings import (
    ALGORITHMS,
    AlgorithmSettings,
    EvaluationSettings,
    LoraSettings,
    OptimizerSettings,
    PoliciesSettings,
    RolloutSettings,
    RunSettings,
    TrackingSettings,
    TrainedModelSettings,
)
from mulligan.trainer.v1 import learner_service_pb2, run_config_pb2
from mulligan.trainer.wire import (
    foreign_from_proto,
    plain_from_proto,
    settings_from_proto,
    settings_to_proto,
    validated,
)
from tests.support.distribution.acme import tilted
from tests.support.effort import examples
from tests.support.paths import ROOT

MESSAGES: dict[str, type[BaseModel]] = {
    "RunConfig": RunSettings,
    "ModelConfig": TrainedModelSettings,
    "LoraConfig": LoraSettings,
    "AlgorithmConfig": erl.Settings,  # fields of its own have the settings of ERL
    "RolloutConfig": RolloutSettings,
    "LossConfig": ppo.Settings,  # as above, those of the default loss
    "OptimizerConfig": OptimizerSettings,
    "EvaluationConfig": EvaluationSettings,
    "ProtocolConfig": ProtocolSettings,
    "PoliciesConfig": PoliciesSettings,
    "TrackingConfig": TrackingSettings,
    "SamplerConfig": uniform.Settings,
    "MemoryPartConfig": MemoryPartSettings,
}
WIRE_ONLY = {"second_attempt", "settings"}  # read as `name`, and as settings beside the others
NUMBERS = {int: "INT", float: "DOUBLE", bool: "BOOL", str: "STRING"}


def inner(annotation: Any) -> Any:
    """`X` of `X | None`, of `tuple[X, ...]`, and the type of a literal's values."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is tuple:
        return inner(get_args(annotation)[0])
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return type(get_args(annotation)[0])
    return get_origin(annotation) or annotation


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The settings of a table."""
    return model.model_fields


def pairs(message: Descriptor, model: type[BaseModel], path: str = "") -> Iterator[tuple[str, FieldDescriptor, Any]]:
    """Every setting: its full name, its field, its type in Python. Fails where one side lacks it."""
    model = MESSAGES.get(message.name, model)
    names = {field.name for field in message.fields} - WIRE_ONLY
    assert names == set(fields_of(model)), path or "RunConfig"
    for name in sorted(names):
        field = message.fields_by_name[name]
        kind = inner(fields_of(model)[name].annotation)
        if field.message_type is not None and field.message_type.full_name == "google.protobuf.Struct":
            assert kind is dict  # of a plug-in
            continue
        yield path + name, field, kind
        if field.message_type is not None:
            yield from pairs(field.message_type, kind, f"{path}{name}.")


def test_both_sides_have_the_same_settings_of_the_same_types() -> None:
    found = list(pairs(run_config_pb2.RunConfig.DESCRIPTOR, RunSettings))
    assert len(found) > 50
    for path, field, kind in found:
        if field.message_type is not None:
            assert issubclass(MESSAGES[field.message_type.name], kind), path
        elif field.enum_type is not None:
            names = [value.name for value in field.enum_type.values]
            prefix = names[0].removesuffix("UNSPECIFIED")
            assert issubclass(kind, StrEnum), path
            assert {name.removeprefix(prefix).lower() for name in names[1:]} == {str(value) for value in kind}, path
        else:
            wire_type = next(name for name in dir(FieldDescriptor) if _is_type(name, field))
            assert NUMBERS[kind] in wire_type, path


def _is_type(name: str, field: FieldDescriptor) -> bool:
    return name.startswith("TYPE_") and getattr(FieldDescriptor, name) == field.type


def test_a_setting_whose_zero_is_legal_has_presence() -> None:
    """Else a client could not ask for 0 where the default is another number."""
    for path, field, _ in pairs(run_config_pb2.RunConfig.DESCRIPTOR, RunSettings):
        always_meant = {"environment", "model.source", "model.lora.rank", "algorithm.name", "algorithm.advantage"}
        always_meant |= {"evaluation.protocols.name", "sampler.name"}
        assert field.has_presence or field.enum_type or field.is_repeated or path in always_meant, path


def test_an_empty_config_is_the_defaults() -> None:
    assert settings_from_proto(run_config_pb2.RunConfig(environment="e")) == RunSettings(environment="e")
    whole = settings_to_proto(RunSettings(environment="e"))
    for path, field, _ in pairs(run_config_pb2.RunConfig.DESCRIPTOR, RunSettings):
        absent = path.startswith(("model.lora", "evaluation.protocols.", "algorithm.memory_mix."))
        absent |= path in ("algorithm.memory_scope", "algorithm.memory_holdout")
        if not absent and not field.is_repeated:
            assert _value(plain_from_proto(whole), path) is not None, f"{path} is stored with the run"


def _value(plain: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        plain = plain[name]
    return plain


positive = st.floats(1e-9, 1e6)
counts = st.integers(1, 1000)
fractions = st.floats(0.01, 1)
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
LORA = st.builds(
    LoraSettings,
    rank=st.integers(1, 64),
    alpha=st.none() | positive,
    target_modules=st.lists(texts, max_size=3).map(tuple),
)
RUNS = st.builds(
    RunSettings,
    environment=texts,
    model=st.builds(
        TrainedModelSettings, source=texts, lora=st.none() | LORA, dtype=st.sampled_from(["float32", "bfloat16"])
    ),
    algorithm=st.builds(
        erl.Settings,
        memory_strategy=st.sampled_from(RetrievalStrategy).filter(lambda one: one not in ("by_key", "mix")),
        memory_entries=st.integers(0, 100),
        memory_readers=st.sampled_from(MemoryReaders),
        memory_holdout=st.none() | st.just(0.0),
        memory_scope=st.none() | texts,
        distillation_loss=st.sampled_from(erl.DistillationLoss),
        distillation_weight=st.just(0.0) | positive,
        normalize_by_std=st.booleans(),
        optimizer_steps=counts,
    ),
    sampler=st.one_of(
        st.builds(uniform.Settings),
        st.builds(adarft.Settings, start=st.none() | positive, rest=fractions),
        st.builds(weakest.Settings, floor=fractions, repeats=st.integers(1, 100)),
        st.builds(horizon.Settings, turns=st.lists(counts, min_size=1, max_size=3).map(tuple)),
        st.builds(mixture.Settings, shares=st.dictionaries(texts, positive, min_size=1, max_size=3)),
    ),
    rollout=st.builds(RolloutSettings, tasks_per_step=counts, temperature=positive, top_p=fractions, top_k=counts),
    loss=st.builds(
        ppo.Settings,
        kl_coefficient=st.just(0.0) | positive,
        dual_clip=st.sampled_from([0.0, 2.0]),
        mismatch_correction=st.sampled_from(MismatchCorrection),
        kl_estimator=st.sampled_from(KlEstimator),
        kl_reference=st.sampled_from(KlReference),
    )
    | st.builds(gspo.Settings, clip_high=positive)
    | st.builds(
        tilted.Settings,
        name=st.just("tests.support.distribution.acme.tilted"),
        tilt=positive,
        rounds=counts,
        names=st.just(("a",)),
    ),
    optimizer=st.builds(
        OptimizerSettings,
        learning_rate=st.just(0.0) | positive,
        warmup_steps=st.integers(0, 9),
        moments=st.sampled_from(["float32", "8bit"]),
    ),
    evaluation=st.builds(
        EvaluationSettings,
        every=st.integers(0, 9),
        temperature=st.just(0.0) | positive,
        protocols=st.just(()) | st.just(({"name": "pass_at_k", "k": [1, 3]}, {"name": "turns", "label": "t"})),
    ),
    policies=st.builds(PoliciesSettings, actor=st.sampled_from(["", "a"]), reflector=st.sampled_from(["", "R-2.b_c"])),
    seed=st.integers(0, 2**63 - 1),
    deterministic=st.booleans(),
)


@settings(max_examples=examples(60))
@given(run=RUNS)
def test_settings_survive_the_wire_and_a_file(run: RunSettings) -> None:
    assert settings_from_proto(settings_to_proto(run)) == run
    assert RunSettings.model_validate_json(run.model_dump_json()) == run


def comments() -> dict[tuple[str, str], str]:
    """(message, field) → the comment above the field, as the contract has it."""
    found: dict[tuple[str, str], str] = {}
    for path in sorted((ROOT / "proto" / "mulligan" / "trainer" / "v1").glob("*.proto")):
        message = ""
        lines = list[str]()
        for line in map(str.strip, path.read_text().splitlines()):
            if match := re.match(r"message (\w+) \{", line):
                message = match[1]
            if line.startswith("//"):
                lines.append(line.removeprefix("//").strip())
                continue
            if match := re.match(r"(?:optional |repeated )?[\w.]+ (\w+) = \d+", line):
                found[message, match[1]] = " ".join(lines)
            lines = []
    return found


COMMENTS = comments()
# Comments that name the defaults of a group of fields, in order: the first of them carries it.
GROUPS = [
    ("RolloutConfig", ("temperature", "top_p", "top_k")),
    ("RolloutConfig", ("reflection_temperature", "reflection_top_p", "reflection_max_tokens")),
    ("EvaluationConfig", ("temperature", "top_p", "top_k")),
]
WITHOUT_DEFAULT = {
    ("RunConfig", "environment"),
    ("LoraConfig", "rank"),
    ("ProtocolConfig", "name"),
    ("MemoryPartConfig", "strategy"),
}


def documented_default(message: str, name: str) -> str | None:
    for group_message, names in GROUPS:
        if message == group_message and name in names:
            match = re.search(r"Defaults (\S+), (\S+) and ([^\s.]+)", COMMENTS[message, names[0]])
            assert match, COMMENTS[message, names[0]]
            return match[names.index(name) + 1]
    comment = COMMENTS[message, name]
    if match := re.search(r"\bDefault:? ([^\s;,]+?)(?:[.;,]*(?:\s|$))", comment, re.IGNORECASE):
        return match[1]
    if match := re.search(r"\"?([\w.-]+)\"?(?:,| \()(?:the )?default\b", comment.replace(", the default", ",default")):
        return match[1]
    return None


def cases() -> list[tuple[str, str]]:
    found = [(message, name) for message, model in MESSAGES.items() for name in fields_of(model)]
    return [(message, name) for message, name in found if not _is_message(message, name) and "_settings" not in name]


def _is_message(message: str, name: str) -> bool:
    kind = inner(fields_of(MESSAGES[message])[name].annotation)
    return isinstance(kind, type) and issubclass(kind, BaseModel)


@pytest.mark.parametrize(("message", "name"), cases())
def test_the_default_that_the_contract_names_is_the_default(message: str, name: str) -> None:
    field = fields_of(MESSAGES[message])[name]
    if (message, name) in WITHOUT_DEFAULT:
        assert field.is_required()
        return
    said = documented_default(message, name)
    default = field.default
    if default in (None, ()):
        assert re.search(r"when absent|when empty|Default: 2 × rank", COMMENTS[message, name]), COMMENTS[message, name]
    else:
        assert said is not None, f"{message}.{name} names no default: {COMMENTS[message, name]!r}"
        expected = str(default).lower() if isinstance(default, bool | StrEnum) else default
        assert (float(said) if isinstance(expected, int | float) else said.strip('"').lower()) == expected


def refusals(**loss: Any) -> dict[str, str]:
    with pytest.raises(ValidationError) as caught:
        RunSettings.model_validate({"environment": "e", "loss": loss})
    return problems(caught.value, RunSettings)


def test_a_loss_has_its_own_settings_beside_the_common_ones() -> None:
    loss = RunSettings.model_validate({"environment": "e", "loss": {"name": "gspo", "clip_high": 0.1}}).loss
    assert loss == gspo.Settings(clip_high=0.1) != gspo.Settings()
    assert loss.model_dump()["clip_low"] == 3e-4, "stored with the run"
    assert "dual_clip" not in loss.model_dump()


@pytest.mark.parametrize(
    ("loss", "field", "words"),
    [
        ({"clip_hihg": 0.1}, "loss.clip_hihg", "no such setting of loss 'ppo'; did you mean 'clip_high'?"),
        ({"kl_coeficient": 0.1}, "loss.kl_coeficient", "did you mean 'kl_coefficient'?"),
        ({"name": "gspo", "dual_clip": 2.0}, "loss.dual_clip", "no such setting of loss 'gspo'; these have it: "),
        ({"name": "gsop"}, "loss.name", "there is no loss 'gsop'; did you mean 'gspo'?"),
        ({"name": "cispo", "clip_low": 1.5}, "loss.clip_low", "less than or equal to 1"),
        ({"clip_high": "a lot"}, "loss.clip_high", "valid number"),
        ({"clip_high": float("inf")}, "loss.clip_high", "finite number"),
        ({"dual_clip": 0.5}, "loss.dual_clip", "expected 0 (off) or a number above 1"),
        ({"mismatch_correction": "maskd"}, "loss.mismatch_correction", "'sequence_masked'; did you mean 'masked'?"),
    ],
)
def test_what_a_loss_does_not_have_is_named(loss: dict[str, Any], field: str, words: str) -> None:
    found = refusals(**loss)
    assert list(found) == [field] and words in found[field]


def test_over_the_wire_too() -> None:
    config = run_config_pb2.RunConfig(environment="e")
    config.loss.name = "cispo"
    config.loss.settings["clip_hihg"] = 2.0
    with pytest.raises(DomainError, match="did you mean 'clip_high'") as caught:
        settings_from_proto(config)
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_SETTING, "loss.clip_hihg")


@pytest.mark.parametrize(
    ("twice", "field"),
    [
        ({"loss": {"clip_low": 0.1, "settings": {"clip_low": 0.2}}}, "loss.clip_low"),
        ({"sampler": {"name": "weakest", "settings": {"name": "weakest"}}}, "sampler.name"),
        (
            {
                "evaluation": {
                    "protocols": [{"name": "turns"}, {"name": "turns", "label": "a", "settings": {"label": "b"}}]
                }
            },
            "evaluation.protocols[1].label",
        ),
    ],
)
def test_a_setting_in_its_field_and_among_the_others_is_refused(twice: dict[str, Any], field: str) -> None:
    config = run_config_pb2.RunConfig(environment="e", **twice)
    for read in (settings_from_proto, foreign_from_proto):
        with pytest.raises(DomainError, match="got both") as caught:
            read(config)
        assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_SETTING, field)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"tracking": {"writers": [f"w{n}" for n in range(65)]}}, "tracking.writers"),
        ({"model": {"lora": {"rank": 1, "target_modules": ["q_proj"] * 4_097}}}, "model.lora.target_modules"),
        (
            {"evaluation": {"protocols": [{"name": "turns", "label": f"t{n}"} for n in range(1_000)]}},
            "evaluation.protocols",
        ),
        ({"algorithm": {"memory_mix": [{"strategy": 1, "limit": 1}] * 9}}, "algorithm.memory_mix"),
    ],
)
def test_lists_of_settings_have_limits(config: dict[str, Any], field: str) -> None:
    """Each item is compared with the others."""
    with pytest.raises(DomainError, match="at most") as caught:
        settings_from_proto(run_config_pb2.RunConfig(environment="e", **config))
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_SETTING, field)


def test_a_learner_refuses_it_too() -> None:
    twice = learner_service_pb2.LossConfig(clip_low=0.1)
    twice.settings["clip_low"] = 0.1
    with pytest.raises(DomainError) as caught:
        loss_from_proto(twice)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.message == "loss.clip_low: expected a field or an entry of `settings`; got both"


def test_of_a_run_elsewhere_tables_without_a_name_are_those_of_the_default_plug_ins() -> None:
    config = run_config_pb2.RunConfig(environment="e")
    config.algorithm.name = "acme.gone"
    config.loss.clip_low = 0.1
    known = foreign_from_proto(config)
    assert (known.algorithm.name, known.sampler) == ("acme.gone", uniform.Settings())
    assert known.loss == ppo.Settings(clip_low=0.1)


@pytest.mark.parametrize(
    ("protocols", "field", "words"),
    [
        ([{"name": "pas_at_k"}], "[0].name", "did you mean 'pass_at_k'"),
        ([{"k": [1]}], "[0].name", "expected one of "),
        ([{"name": "turns"}, {"name": "pass_at_k", "k": [1, 0]}], "[1].k[1]", "greater than or equal to 1"),
        ([{"name": "pass_at_k", "kk": [1]}], "[0].kk", "did you mean 'k'"),
        ([{"name": "pass_at_k", "samples": 3}], "[0].samples", "at least the largest k, 4"),
        ([{"name": "turns"}, {"name": "turns"}], "[1].label", "'turns' is there twice"),
        ([{"name": "turns", "label": "a/b"}], "[0].label", "match pattern"),
        ([{"name": "turns"}, 3], "[1]", "expected a table of settings, its `name` one of "),
        ([{"name": "json"}], "[0].name", "'json' is no protocol: it has no `Settings`"),
    ],
)
def test_a_bad_setting_of_a_protocol_is_named(protocols: Any, field: str, words: str) -> None:
    with pytest.raises(DomainError) as caught:
        validated(RunSettings, {"environment": "e", "evaluation": {"protocols": protocols}})
    assert caught.value.metadata == {"field": f"evaluation.protocols{field}"} and words in caught.value.message


def test_a_protocol_may_be_there_twice_under_two_labels() -> None:
    twice = [{"name": "turns", "tries": 2, "label": "short"}, {"name": "turns"}]
    found = validated(EvaluationSettings, {"protocols": twice}).protocols
    assert [protocol.prefix for protocol in found] == ["short", "turns"]


def test_settings_without_a_field_travel_by_name() -> None:
    loss = tilted.Settings(name="tests.support.distribution.acme.tilted", tilt=0.5)
    config = settings_to_proto(RunSettings(environment="e", loss=loss)).loss
    assert dict(config.settings) == {"tilt": 0.5, "rounds": 3.0, "names": []}
    assert not config.HasField("clip_low")
    assert settings_from_proto(run_config_pb2.RunConfig(environment="e", loss=config)).loss == loss


@pytest.mark.parametrize(
    ("table", "settings", "field", "words"),
    [
        ("algorithm", {"name": "elr"}, "name", "there is no algorithm 'elr'; did you mean 'erl'?; there are "),
        ("algorithm", {"name": 3}, "name", "expected one of "),
        ("algorithm", "erl", "", "expected a table of settings, its `name` one of "),
        (
            "algorithm",
            {"name": "nft", "distillation_baseline": True},
            "distillation_baseline",
            "no such setting of algorithm 'nft'; these have it: ",
        ),
        ("algorithm", {"name": "sdpo", "bta": 1}, "bta", "of algorithm 'sdpo'; did you mean 'beta'?"),
        ("algorithm", {"aggregation": "token_men"}, "aggregation", "'token_mean' or 'constant'; did you mean 'token_m"),
        ("algorithm", {"advantage": "gpro"}, "advantage", "no advantage estimator 'gpro'; did you mean 'grpo'?"),
        (
            "algorithm",
            {"advantage": "turn_level", "advantage_settings": {"turn_lamda": 1}},
            "advantage_settings.turn_lamda",
            "no such setting of advantage estimator 'turn_level'; did you mean 'turn_lambda'?",
        ),
        (
            "algorithm",
            {"advantage": "over_turn", "advantage_settings": {"base": "gpro"}},
            "advantage_settings.base",
            "there is no advantage estimator 'gpro'; did you mean 'grpo'?",
        ),
        (
            "algorithm",
            {"advantage": "over_turn", "advantage_settings": {"base": "raft", "base_settings": {"turn_lambda": 1}}},
            "advantage_settings.base_settings.turn_lambda",
            "no such setting of advantage estimator 'raft'; these have it: ",
        ),
        ("sampler", {"name": "weekest"}, "name", "there is no sampler 'weekest'; did you mean 'weakest'?"),
        ("sampler", {"target_reward": 1}, "target_reward", "of sampler 'uniform'; these have it: "),
        ("sampler", "weakest", "", "expected a table of settings, its `name` one of "),
        ("loss", "gspo", "", "expected a table of settings, its `name` one of "),
        ("rollout", {"replace_rounds": 1, "rollouts_per_task": 1}, "replace_rounds", "expected 0, as a group of one"),
        ("policies", {"actor": "a", "judge": "a"}, "judge", "expected another policy than the actor"),
        ("model", {"dtype": "float23"}, "dtype", "did you mean 'float32'?"),
    ],
)
def test_a_bad_setting_is_named_with_the_nearest_right_name(table: str, settings: Any, field: str, words: str) -> None:
    with pytest.raises(DomainError) as caught:
        validated(RunSettings, {"environment": "e", table: settings})
    assert caught.value.metadata == {"field": f"{table}.{field}".rstrip(".")} and words in caught.value.message


# Counts that a caller gives.

# Without an upper bound: nothing is made that is as long.
UNBOUNDED = {
    "RolloutSettings.max_tokens",
    "RolloutSettings.reflection_max_tokens",
    "RolloutSettings.max_restarts",  # one after the other
    "RolloutSettings.top_k",
    "RolloutSettings.train_tasks",  # of those that the environment has
    "EvaluationSettings.every",
    "EvaluationSettings.tasks",  # likewise
    "EvaluationSettings.top_k",
    "OptimizerSettings.warmup_steps",
    "OptimizerSettings.max_skipped_steps",
    "RunSettings.steps",  # one after the other
    "RunSettings.seed",
    "RunSettings.checkpoint_every",
    "RunSettings.keep_checkpoints",
    "loss.reference_every",
    "sampler horizon.turns",
    "sampler horizon.steps_each",
    "sampler weakest.visits",  # of those that there were
    "algorithm expert_iteration.per_task",  # likewise
}


TABLES: list[type[BaseModel]] = [
    RunSettings,
    RolloutSettings,
    EvaluationSettings,
    OptimizerSettings,
    LoraSettings,
    PoliciesSettings,
    TrackingSettings,
    TrainedModelSettings,
    MemoryPartSettings,
    AlgorithmSettings,
]


def tables() -> Iterator[tuple[str, type[BaseModel]]]:
    """Every table of settings, with a name for it."""
    for model in TABLES:
        yield model.__name__, model
    for kind in (ALGORITHMS, SAMPLERS, PROTOCOLS, LOSSES, ADVANTAGES):
        for name in kind.names:
            yield f"{kind.noun} {name}", kind.find(name).Settings


def bounds(field: FieldInfo) -> bool:
    """Whether a whole number, or each of several, has an upper bound."""
    metadata = list(field.metadata)
    for part in (field.annotation, *get_args(field.annotation)):
        if get_origin(part) is Annotated:
            for one in get_args(part)[1:]:
                metadata += one.metadata if isinstance(one, FieldInfo) else [one]
    return any(hasattr(one, "le") or hasattr(one, "lt") for one in metadata)


def test_a_count_that_a_caller_gives_is_bounded() -> None:
    """What a caller asks for with a number must not exhaust the trainer for all. A new count gets a bound, or stands
    among those that need none."""
    found = set()
    for name, model in tables():
        common = next((one for one in (AlgorithmSettings, LossSettings) if issubclass(model, one)), None)
        for setting, field in fields_of(model).items():
            if inner(field.annotation) is not int or bounds(field):
                continue
            inherited = common is not None and model is not common and setting in fields_of(common)
            found.add(f"loss.{setting}" if inherited and common is LossSettings else f"{name}.{setting}")
    assert found == UNBOUNDED


def test_lists_that_a_caller_gives_are_bounded() -> None:
    protocol = {"name": "misled"}
    many = {"evaluation": {"protocols": [protocol | {"label": f"p{number}"} for number in range(33)]}}
    with pytest.raises(DomainError, match=r"evaluation\.protocols: .* at most 32 items"):
        validated(RunSettings, {"environment": "fake"} | many)
    tables = [{"name": "pass_at_k", "k": list(range(1, 66))}]
    with pytest.raises(DomainError, match=r"evaluation\.protocols\[0\]\.k: .* at most 64 items"):
        validated(RunSettings, {"environment": "fake", "evaluation": {"protocols": tables}})


@pytest.mark.parametrize(
    ("given", "field", "limit"),
    [
        ({"evaluation": {"samples": 10_001}}, "evaluation.samples", "10000"),
        (
            {"evaluation": {"protocols": [{"name": "misled", "samples": 10_001}]}},
            "evaluation.protocols[0].samples",
            "10000",
        ),
        ({"rollout": {"concurrency": 65_537}}, "rollout.concurrency", "65536"),
        ({"rollout": {"replace_rounds": 101}}, "rollout.replace_rounds", "100"),
        ({"rollout": {"rollouts_per_task": 2**31 - 1}}, "rollout.rollouts_per_task", "4096"),
        ({"rollout": {"tasks_per_step": 16_385}}, "rollout.tasks_per_step", "16384 with rollouts_per_task = 4"),
        (
            {"rollout": {"tasks_per_step": 1_639, "max_staleness": 9}},
            "rollout.tasks_per_step",
            "1638 with rollouts_per_task = 4 and max_staleness = 9",
        ),
        ({"rollout": {"rollouts_per_task": 649, "max_staleness": 100}}, "rollout.rollouts_per_task", "648 with max_st"),
        ({"sampler": {"name": "weakest", "repeats": 101}}, "sampler.repeats", "100"),
    ],
)
def test_a_count_beyond_its_bound_is_named(given: dict[str, Any], field: str, limit: str) -> None:
    with pytest.raises(DomainError, match=re.escape(limit)) as caught:
        validated(RunSettings, {"environment": "fake"} | given)
    assert caught.value.reason is Reason.INVALID_SETTING
    assert caught.value.metadata["field"] == field and caught.value.message.startswith(f"{field}: ")


def test_the_largest_counts_are_taken() -> None:
    rollout = {"tasks_per_step": 16_384, "concurrency": 65_536, "replace_rounds": 100}
    validated(RunSettings, {"environment": "fake", "rollout": rollout, "evaluation": {"samples": 10_000}})
