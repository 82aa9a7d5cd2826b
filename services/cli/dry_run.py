"""`mulligan train --dry-run`: what a run would take of memory, tokens and time, estimated without starting anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import ConfigDict, Field, ValidationError

from mulligan.cli.out import fail, show, table
from mulligan.cli.overrides import read_overrides
from mulligan.cli.progress import LiveLine
from mulligan.common.errors import DomainError
from mulligan.common.model_files import UnsupportedModel
from mulligan.common.number_settings import NumberSettings
from mulligan.common.suggest import problems
from mulligan.env.envs import DEFAULT_ENVIRONMENTS
from mulligan.env.load import load_or_explain
from mulligan.trainer.algorithms import Played
from mulligan.trainer.estimate.memory import Memory, Training, memory
from mulligan.trainer.estimate.shapes import ModelShape, UnknownShape, shape_of
from mulligan.trainer.estimate.work import (
    GPUS,
    Flops,
    Gpu,
    StepTokens,
    seconds,
    step_flops,
    step_tokens,
)
from mulligan.trainer.settings import ALGORITHMS, RunSettings

# The limits of prompts under which the paper trained in these environments (arXiv 2602.13949), in tokens.
PUBLISHED_PROMPTS = {"frozenlake": 6114, "sokoban": 6114, "hotpotqa": 8192}
_PROMPT = 1024  # elsewhere
_COUNTS = (1, 2, 8)  # GPUs
_QUIET_SECONDS = 5.0  # without a terminal
_USABLE = 0.9  # of a GPU's memory: CUDA, NCCL and fragmentation take some
_ROWS: Sequence[tuple[str, Callable[[Memory], float]]] = (
    ("weights", lambda one: one.weights),
    ("gradients", lambda one: one.gradients),
    ("Adam's moments", lambda one: one.moments),
    ("reference of the KL", lambda one: one.reference),
    ("layers gathered from other GPUs", lambda one: one.gathered),
    ("activations", lambda one: one.activations),
    ("copies of weights by autocast", lambda one: one.copies),
    ("head and loss", lambda one: one.head),
    ("or a layer's backward pass", lambda one: one.layer),
)


class Assumptions(NumberSettings):
    """What neither a recipe nor a model says."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    gpu: Literal["a100", "h100", "h200"] = "h100"
    utilisation: float = Field(0.25, gt=0, le=1)  # of the peak
    microbatch_tokens: int = Field(4096, ge=1)  # of the trainer's settings
    # Of a sequence, all that is not sampled; None: the published limit of the environment, else 1,024.
    prompt_tokens: int | None = Field(None, ge=1)
    turns: int | None = Field(None, ge=1)  # of an episode; None: the environment's limit


def read_assumptions(given: Sequence[str]) -> Assumptions:
    """Ends the program with one line if one is wrong."""
    try:
        return Assumptions.model_validate(read_overrides(given, "--assume"))
    except ValidationError as error:
        name, said = next(iter(problems(error, Assumptions).items()))
        fail(f"--assume {name}: {said}", 2)


def dry_run(settings: RunSettings, assumed: Assumptions) -> None:
    """Prints the estimates. Ends the program with one line if the model's shape or the episode's length is unknown, or
    nothing is trained."""
    if not settings.trains:
        fail('--dry-run: expected a run that trains; with learner = "none" there is no learner to estimate', 2)
    try:
        with LiveLine("reading what the model and the environment are", first=_QUIET_SECONDS):
            shape, source = shape_of(settings.model.source)
            training = Training.of(settings, shape)
            turns = assumed.turns or _turns(settings.environment)
            plays: Played | None = getattr(ALGORITHMS.find(settings.algorithm.name), "PLAYS", None)
    except (UnknownShape, UnsupportedModel, DomainError) as error:
        fail(error, 2)
    prompt = assumed.prompt_tokens or PUBLISHED_PROMPTS.get(settings.environment, _PROMPT)
    step = step_tokens(settings, plays or Played(1), turns=turns, prompt=prompt, context=shape.context)
    _say_what(settings, assumed, shape, training, source)
    _say_memory(shape, training, max(assumed.microbatch_tokens, step.longest))
    _say_assumed(assumed, turns, prompt, settings.environment)
    if plays is None:
        show(f"Of {settings.algorithm.name} one episode in each rollout is counted; it may train on more.")
    show()
    _say_work(settings, assumed, shape, training, step)


def _turns(environment: str) -> int:
    known = DEFAULT_ENVIRONMENTS.get(environment)
    turns = load_or_explain(environment, known).info.max_steps if known else 0
    if not turns:
        fail(f"{environment}: how many turns an episode has is not known here; say it: --assume turns=NUMBER", 2)
    return turns


def _say_what(settings: RunSettings, assumed: Assumptions, shape: ModelShape, training: Training, source: str) -> None:
    show(f"{settings.model.source}: {shape.architecture}, {_number(shape.parameters)} parameters ({source})")
    trained = training.trained_parameters(shape)
    what = f"LoRA of rank {training.rank}, {_number(trained)} parameters" if training.rank else "all weights"
    show(f"trained: {what}; computed in {settings.model.dtype}")
    sent, saved = training.published_bytes(shape), training.checkpoint_bytes(shape)
    show(f"sent to the policy after each step: {_gib(sent)} GiB; a checkpoint: {_gib(saved)} GiB")
    show()


def _say_memory(shape: ModelShape, training: Training, tokens: int) -> None:
    columns = ["memory per GPU, GiB", *(_gpus(count) for count in _COUNTS)]
    for checkpointing in (False, True):
        found = [memory(shape, training, tokens, gpus=count, checkpointing=checkpointing) for count in _COUNTS]
        rows = [(name, *(_gib(read(one)) for one in found)) for name, read in _ROWS]
        rows.append(("most at a time", *(_gib(one.total) for one in found)))
        setting = "true" if checkpointing else "false"
        show(f"gradient_checkpointing = {setting}, {tokens:,} tokens at once")
        table(columns, [row for row in rows if set(row[1:]) != {"0"}], whole=columns)
        show("  fits on: " + "; ".join(_fitting(name, gpu, found) for name, gpu in GPUS.items()))
        show()


def _fitting(name: str, gpu: Gpu, found: Sequence[Memory]) -> str:
    fits = [str(count) for count, one in zip(_COUNTS, found, strict=True) if one.total <= _USABLE * gpu.memory]
    return f"{name}: {' or '.join(fits) or 'none of these'}"


def _say_assumed(assumed: Assumptions, turns: int, prompt: int, environment: str) -> None:
    gpu = GPUS[assumed.gpu]
    show("Assumed, and changed by --assume NAME=VALUE:")
    whose = "" if assumed.turns else f", the limit of {environment}"
    known = f", the published limit of {environment}" if environment in PUBLISHED_PROMPTS else "; not known here"
    limit = "" if assumed.prompt_tokens else known
    for name, said in {
        "gpu": f"{gpu.name}, {gpu.bfloat16 / 1e12:g} TFLOPS in bfloat16, {gpu.float32 / 1e12:g} in float32",
        "utilisation": f"{assumed.utilisation:g} of that peak, in all passes; several GPUs divide the work evenly",
        "microbatch_tokens": f"{assumed.microbatch_tokens:,}; a longer sequence is computed alone",
        "prompt_tokens": f"{prompt:,} of a sequence are not sampled{limit}",
        "turns": f"{turns} in an episode{whose}",
    }.items():
        show(f"  {name} = {said}")
    show("All answers have their limit of tokens, no attempt succeeds before the last, and no prefixes are shared.")
    show(f"It fits where at most {_USABLE:.0%} of a GPU's memory is used.")


def _say_work(
    settings: RunSettings, assumed: Assumptions, shape: ModelShape, training: Training, step: StepTokens
) -> None:
    flops = step_flops(shape, training, settings, step)
    sequences = step.episodes + step.texts
    longest = f"{sequences:,} trained sequences of up to {step.longest:,} tokens"
    show(f"a step, at most: {longest}, {_number(step.trained)} tokens in all")
    show(f"  {_number(step.sampled)} of them are sampled; how long that takes depends on the policy's servers")
    show(f"the run of {settings.steps:,} steps: {_number(step.trained * settings.steps)} trained tokens")
    show()
    rows = [row for checkpointing in (False, True) for row in _times(flops, settings, assumed, training, checkpointing)]
    table(["the learner", "PFLOP", *(_gpus(count) for count in _COUNTS)], rows)


def _times(
    flops: Flops, settings: RunSettings, assumed: Assumptions, training: Training, checkpointing: bool
) -> list[tuple[str, ...]]:
    gpu = GPUS[assumed.gpu]
    times = [
        seconds(flops, gpu, training, gpus=count, utilisation=assumed.utilisation, checkpointing=checkpointing)
        for count in _COUNTS
    ]
    done = flops.model + (flops.recomputed if checkpointing else 0)
    how = "with checkpointing" if checkpointing else "without checkpointing"
    return [
        (f"{name} {how}", _digits(done * steps / 1e15), *(_duration(one * steps) for one in times))
        for name, steps in (("a step", 1), ("the run", settings.steps))
    ]


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def _digits(value: float) -> str:
    """Three of them, or a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _gib(count: float) -> str:
    return _digits(count / 2**30)


def _number(count: float) -> str:
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{_digits(count / size)} {word}"
    return f"{count:,}"


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds)} s"
