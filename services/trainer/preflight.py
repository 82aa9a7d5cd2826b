"""Preflight: checks before a run or an evaluation begins.

Each check raises DomainError INVALID_SETTING; the metadata `field` names the setting that does not fit. What does no
harm is told as a notice (`idle_notices`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Feature, PolicyInfo
from mulligan.common.reflections import RetrievalStrategy
from mulligan.common.suggest import did_you_mean
from mulligan.common.types import EnvironmentInfo, Split, TaskInfo
from mulligan.trainer.advantages import ADVANTAGES
from mulligan.trainer.aggregation import Aggregation
from mulligan.trainer.idle import is_given, notices_of_idle_runs, notices_of_ignored
from mulligan.trainer.interfaces import MemoryPort
from mulligan.trainer.loss_terms import KlReference, MismatchCorrection
from mulligan.trainer.recall import query_of
from mulligan.trainer.settings import RunSettings

# Settings that mean something only with some values of another one of their table.
_ONLY_WITH: tuple[tuple[str, str, str, Collection[str]], ...] = (
    ("algorithm", "normalize_by_std", "advantage", (ADVANTAGES.default,)),
    ("algorithm", "aggregation_constant", "aggregation", (Aggregation.CONSTANT,)),
    ("loss", "mismatch_limit", "mismatch_correction", tuple(set(MismatchCorrection) - {MismatchCorrection.NONE})),
    ("loss", "reference_every", "kl_reference", (KlReference.MOVING,)),
)
STRICT_TOLERANCE = 0.01  # with a tolerance up to this, a weight check fails on the rounding of bfloat16


def check_actor(
    info: PolicyInfo,
    settings: RunSettings,
    fingerprint: str,
    adapted_layers: Collection[str] = (),
    field: str = "policies.actor",
) -> None:
    """Checks that the policy can be trained by this run's learner. `field` is the setting that names it.

    It must fit the run (`check_trainable`), serve the learner's model (`fingerprint`), and with LoRA take an adapter
    for `adapted_layers`.

    Raises DomainError INVALID_SETTING or MODEL_MISMATCH.
    """
    check_trainable(info, settings, field)
    if info.fingerprint != fingerprint:
        source, revision = settings.model.source, settings.model.revision
        at = f" --set revision={revision}" if revision else ""
        name = info.name or "NAME"
        raise DomainError(
            Reason.MODEL_MISMATCH,
            f"policy {info.name!r} serves {info.model}, and this run trains {source}. Make the policy serve it "
            f"(`mulligan policy load {name} --model {source}{at}`), or have the run train what is served "
            "(model.source)",
        )
    if settings.model.lora is not None:
        _check_layers(info, adapted_layers)


def check_trainable(info: PolicyInfo, settings: RunSettings, field: str = "policies.actor") -> None:
    """Checks what is known before there is a learner: that the policy reports token ids and log-probabilities, takes
    weights of the kind that the run publishes, and can sample as the run's settings say.

    Raises DomainError INVALID_SETTING.
    """
    weights = Feature.FULL_WEIGHTS if settings.model.lora is None else Feature.LORA_WEIGHTS
    missing = [feature for feature in (Feature.TOKEN_IDS, Feature.LOG_PROBS, weights) if feature not in info.features]
    if missing:
        raise _invalid(field, f"policy {info.name!r} ({info.backend}) cannot be trained: no {missing[0]}")
    if info.frozen:
        raise _invalid(field, f"policy {info.name!r} is frozen, and this run would update its weights")
    _check_dtype(info, settings.model.dtype)
    check_sampling(info, settings)
    if settings.model.lora is not None:
        _check_rank(info, settings.model.lora.rank)


def check_sampling(info: PolicyInfo, settings: RunSettings) -> None:
    """Checks that the policy can sample as the run's settings say."""
    if settings.deterministic and not info.deterministic:
        raise _invalid("deterministic", "the policy service is not deterministic itself")
    check_top_k(info, settings.rollout.top_k, "rollout.top_k")
    check_top_k(info, settings.evaluation.top_k, "evaluation.top_k")


async def check_memory(memory: MemoryPort, settings: RunSettings, scope: str) -> None:
    """Asks the memory once as the run will, if it asks by more than what writers claim.

    Raises DomainError INVALID_SETTING for a strategy that the service lacks an embedder for.
    """
    algorithm = settings.algorithm
    if algorithm.memory_entries == 0 or algorithm.by_claims:
        return
    try:
        await memory.query(replace(query_of(algorithm, scope, settings.environment), text="a question"))
    except DomainError as error:
        if error.reason is not Reason.NO_EMBEDDER:
            raise
        by_meaning = RetrievalStrategy.SIMILAR_MEANING
        field = next(field for field, strategy in algorithm.strategies if strategy is by_meaning)
        problem = f'the memory service has no embedder, which "{by_meaning}" needs; expected another strategy'
        raise _invalid(f"algorithm.{field}", problem) from error


def idle_notices(settings: RunSettings) -> list[str]:
    """A notice for each setting that somebody gave and that has no effect, and for what keeps the run from learning."""
    found = [*notices_of_idle_runs(settings), *notices_of_ignored(settings)]
    ignored = {text.partition(":")[0] for text in found}
    for table, setting, other, needed in _ONLY_WITH:
        chosen = getattr(settings, table)
        value = getattr(chosen, other)
        if value not in needed and is_given(chosen, setting) and f"{table}.{setting}" not in ignored:
            wanted = " or ".join(f'"{one}"' for one in sorted(needed))
            found.append(f'{table}.{setting}: it has no effect with {table}.{other} = "{value}", only with {wanted}')
    algorithm = settings.algorithm
    if algorithm.advantage == "over_turn" and algorithm.aggregation is Aggregation.TOKEN_MEAN:
        found.append(
            'algorithm.aggregation: with "token_mean" and algorithm.advantage = "over_turn", the tokens of truncated '
            "samples count in the mean, which is not the paper's loss; that of another aggregation is"
        )
    has_own = "normalize_by_std" in algorithm.advantage_settings and "algorithm.normalize_by_std" not in ignored
    if has_own and is_given(algorithm, "normalize_by_std"):
        found.append("algorithm.normalize_by_std: it has no effect, as algorithm.advantage_settings has it, too")
    if algorithm.memory_entries == 0:
        read = ("memory_strategy", "memory_mix", "memory_tokens", "memory_holdout", "memory_readers", "memory_family")
        given = [setting for setting in read if is_given(algorithm, setting)]
        if algorithm.memory_document:
            found.append("algorithm.memory_document: the run does not read it with algorithm.memory_entries = 0")
            given = [setting for setting in given if setting != "memory_strategy"]  # it follows from the document
        found += [f"algorithm.{setting}: it has no effect with algorithm.memory_entries = 0" for setting in given]
    return found


def check_tasks(
    environment: EnvironmentInfo, tasks: Mapping[Split, Sequence[TaskInfo]], field: str = "environment"
) -> None:
    """Checks that the environment has tasks in each split. `field` is the setting that names it."""
    _check_available(environment, field)
    for split, listed in tasks.items():
        if not listed:
            needed = "training tasks" if split is Split.TRAIN else "test tasks, on which a policy is measured"
            raise _invalid(field, f"{environment.name!r} has no {needed}; expected at least one")


def _check_available(environment: EnvironmentInfo, field: str) -> None:
    if environment.unavailable:
        raise _invalid(field, f"{environment.name!r} is unavailable: {environment.unavailable}")


def _check_dtype(info: PolicyInfo, dtype: str) -> None:
    """Checks that the policy's weight check tolerates the rounding between two dtypes."""
    tolerance = info.canary_tolerance
    if info.dtype in ("", dtype) or tolerance is None or tolerance > STRICT_TOLERANCE:
        return
    raise _invalid(
        "model.dtype",
        f"the dtypes differ: this run computes in {dtype}, policy {info.name!r} in {info.dtype}, and its canary lets "
        f"differences of {tolerance:g} pass; expected {info.dtype}, or a policy that computes in {dtype} "
        "(its setting `dtype`, or the flag --dtype of its servers)",
    )


def _check_rank(info: PolicyInfo, rank: int) -> None:
    """Checks that the engine takes an adapter of this rank."""
    limits = info.lora
    if limits.max_rank and rank > limits.max_rank:
        raise _invalid(
            "model.lora.rank",
            f"the engine of policy {info.name!r} takes adapters of rank {limits.max_rank} at most, and this run's has "
            f"{rank}; expected 1 to {limits.max_rank}, or an engine with more room ({info.backend}: --max-lora-rank)",
        )


def _check_layers(info: PolicyInfo, layers: Collection[str]) -> None:
    """Checks that the engine takes an adapter for these layers."""
    limits = info.lora
    others = sorted(set(layers).difference(limits.target_modules))
    if limits.target_modules and others:
        raise _invalid(
            "model.lora.target_modules",
            f"the engine of policy {info.name!r} takes adapters of {', '.join(limits.target_modules)} alone, and this "
            f"run's has {', '.join(others)}, too; expected {list(limits.target_modules)}, or an engine with room for "
            f"all ({info.backend}: --lora-target-modules)",
        )


def check_environment(environment: EnvironmentInfo, policy: PolicyInfo, field: str = "environment") -> None:
    """Checks that this policy can play this environment. `field` is the setting that names it."""
    _check_available(environment, field)
    name = environment.name
    if environment.player_count > 1:
        raise _invalid(
            field,
            f"{name!r} is a game of {environment.player_count} players; expected one in which a single agent acts",
        )
    if environment.tools and Feature.TOOLS not in policy.features:
        raise _invalid(
            field,
            f"{name!r} shows its tools through the chat template, and that of policy {policy.name!r} ({policy.model}) "
            "has no place for any; expected an environment whose prompt describes its tools (some have a setting "
            'for that: `tools = "prompt"`)',
        )


def check_algorithm(
    name: str, algorithm: Any, environment: EnvironmentInfo, policy: PolicyInfo, speakers: Collection[str] = ()
) -> None:
    """Checks that environment and policy can do what the algorithm of this name, a module or the object of an entry
    point, declares in `NEEDS`. `speakers` are the purposes for which the run has policies of their own.

    Raises DomainError INVALID_SETTING.
    """
    lacking = {
        "fork": not (environment.can_fork and environment.deterministic)
        and f"forks episodes, and environment {environment.name!r} "
        + ("is not deterministic" if environment.can_fork else "has no forks"),
        "tokenize": (policy.rewrites_history or Feature.TOKEN_IDS not in policy.features)
        and f"trains on several turns as one token sequence, and {_no_sequence(policy)}",
        "own_reflections": "reflector" in speakers
        and "trains the policy on its reflections, and here another one writes them (policies.reflector)",
    }
    for feature in (Feature.TOKEN_IDS, Feature.SCORE):
        has_it = feature in policy.features
        lacking[feature.value] = (
            not has_it and f"needs {feature}, and policy {policy.name!r} ({policy.backend}) has none"
        )
    needs: Collection[str] = getattr(algorithm, "NEEDS", ())
    if isinstance(needs, str) or not isinstance(needs, Collection):
        expected = f"{{{needs!r}}}, a set" if isinstance(needs, str) else "a set of texts"
        raise _invalid("algorithm.name", f"{name!r} has NEEDS = {needs!r}; expected {expected}")
    for need in needs:
        if need not in lacking:
            near = did_you_mean(need, lacking)
            raise _invalid("algorithm.name", f"{name!r} declares an unknown need {need!r}{near}")
        if problem := lacking[need]:
            raise _invalid("algorithm.name", f"{name!r} {problem}")


def _no_sequence(policy: PolicyInfo) -> str:
    """Why the turns of an episode are no token sequence that is known."""
    if policy.rewrites_history:
        return f"the chat template of policy {policy.name!r} rewrites earlier turns"
    return f"policy {policy.name!r} ({policy.backend}) reports no token_ids"


def check_other(purpose: str, info: PolicyInfo, actor: PolicyInfo, otherwise: str) -> None:
    """Checks that the policy for this purpose is another than the actor. `otherwise` is what happens without one."""
    if info.name == actor.name:  # one of the two names may be empty
        raise _invalid(f"policies.{purpose}", f"it is the actor; leave it empty, then {otherwise}")


@contextmanager
def named_by(field: str) -> Iterator[None]:
    """Within it, a policy or environment is asked for whose name stands in the setting `field`: where there is none of
    this name, the error names the setting, too."""
    try:
        yield
    except DomainError as error:
        if error.reason not in (Reason.UNKNOWN_POLICY, Reason.UNKNOWN_ENVIRONMENT):
            raise
        raise error.told(f"{field}: {error.message}", field=field) from error


def check_top_k(info: PolicyInfo, top_k: int, field: str) -> None:
    """Checks that the policy supports top-k sampling, if it is wanted."""
    if top_k and Feature.TOP_K not in info.features:
        raise _invalid(field, f"policy {info.name!r} ({info.backend}) has no top_k; expected 0")


def _invalid(field: str, problem: str) -> DomainError:
    return DomainError(Reason.INVALID_SETTING, f"{field}: {problem}", field=field)
