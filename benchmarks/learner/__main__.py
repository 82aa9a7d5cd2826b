"""The learner against TRL and a bare training loop: `python -m benchmarks.learner [--quick] [--lm FOLDER]`.

Six ways compute the gradient over the same data, in turn, on one thread: TRL's GRPOTrainer, with the best of several
sizes of micro-batches; the bare loop, which is transformers' own forward with `labels` in batches of similar length,
without checks, metrics or a policy-gradient loss; the learner in this process, which computes shared prefixes once; the
same without that; the learner with the optimizer's step, in this process and behind gRPC on loopback. The data are a
step of ERL as the demo trained on it (in one call, and dealt out over its optimizer steps), and sequences that share
nothing. With `--lm`, a folder of SmolLM2-135M (`mulligan models fetch smollm2-135m`), also a recorded step of `make
demo-lm`. Padding is not counted. The peaks of memory of two steps, with and without LoRA, are those of processes of
their own. Whole trainings come last, beside TRL's (`benchmarks/learner/rollouts.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import structlog
import torch
from transformers import AutoConfig

from benchmarks.common import alternate, median, print_result, print_table, spread
from benchmarks.learner import peak, rollouts
from benchmarks.learner.batches import ERL_DEMO, ERL_DEMO_LM, ERL_DEMO_MINIBATCHES, ragged, recorded
from benchmarks.learner.with_trl import TrlStep
from mulligan.common.channel import Endpoint
from mulligan.common.server import RequestInterceptor
from mulligan.models import EMBEDDED
from mulligan.trainer.batch import minibatches
from mulligan.trainer.data import Datum
from mulligan.trainer.learner.batching import length, pack
from mulligan.trainer.learner.client import LearnerClient
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.servicer import LearnerServicer, add_to_server
from mulligan.trainer.learner.settings import LearnerServerSettings, LearnerSpec
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import TrainedModelSettings

LOSS = ppo.Settings(kl_coefficient=0.0)
TRL, BARE, OURS, SEPARATE = "TRL", "bare loop", "learner", "learner without sharing"
STEPPED, REMOTE = "learner with optimizer steps", "learner over gRPC with optimizer steps"
TRL_ROWS = (4, 8, 16, 32)
LORA_RANK = 16
FULL, TRL_FULL, LORA = f"{peak.OURS}, full", f"{peak.TRL}, full", f"{peak.OURS}, LoRA"
CHECKPOINTING = f"{LORA}, gradient checkpointing"
PEAKS = {  # of one step: the way, the rank of LoRA or 0, whether with gradient checkpointing
    FULL: (peak.OURS, 0, False),
    LORA: (peak.OURS, LORA_RANK, False),
    CHECKPOINTING: (peak.OURS, LORA_RANK, True),
    TRL_FULL: (peak.TRL, 0, False),
    f"{peak.TRL}, LoRA": (peak.TRL, LORA_RANK, False),
}
Calls = Sequence[list[Datum]]
Rates = dict[str, list[float]]  # tokens per second in each round, by way


def bare(learner: Learner, calls: Calls) -> None:
    for data in calls:
        for rows in pack(data, range(len(data)), learner.server.microbatch_tokens, sharing=False):
            width = max(len(data[row].token_ids) for row in rows)
            ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
            labels_BT = torch.full((len(rows), width), -100)
            for place, row in enumerate(rows):
                tokens = torch.tensor(data[row].token_ids)
                mask = torch.tensor(data[row].loss_mask)
                ids_BT[place, : len(tokens)] = tokens
                labels_BT[place, : len(tokens)][mask] = tokens[mask]
            learner.model.base(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss.backward()
        learner.model.base.zero_grad(set_to_none=True)


def in_process(learner: Learner, calls: Calls, *, sharing: bool) -> None:
    learner.model.shares_prefixes = sharing
    for data in calls:
        learner.forward_backward(data, LOSS)
        learner.model.base.zero_grad(set_to_none=True)


def with_steps(learner: Learner, calls: Calls) -> None:
    """What a client has a server do: no call clears the gradient without a step."""
    learner.model.shares_prefixes = True
    for data in calls:
        learner.forward_backward(data, LOSS)
        learner.optim_step()


async def serve(stack: AsyncExitStack, settings: LearnerServerSettings, spec: LearnerSpec) -> LearnerClient:
    servicer = LearnerServicer(settings)
    server = grpc.aio.server(interceptors=[RequestInterceptor()])
    add_to_server(server, servicer)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stack.push_async_callback(servicer.close)
    stack.push_async_callback(server.stop, None)
    client = await LearnerClient.create(Endpoint(f"127.0.0.1:{port}"), "remote", "benchmark", spec)
    stack.push_async_callback(client.close)
    return client


async def measure(folder: Path, model: Path, batches: Mapping[str, Calls], rounds: int) -> tuple[dict[str, Rates], int]:
    """The rates of each kind of data, and TRL's best size of a micro-batch."""
    # With a learning rate of 0 each way and round computes the same.
    spec = LearnerSpec(TrainedModelSettings(source=str(model)))
    spec = replace(spec, optimizer=spec.optimizer.model_copy(update={"learning_rate": 0.0}))
    settings = LearnerServerSettings(folder / "weights", folder / "checkpoints", threads=1, models_folder=model.parent)
    local = Learner("local", spec, settings)
    trl = _best(model, next(iter(batches.values())))
    async with AsyncExitStack() as stack:
        client = await serve(stack, settings, spec)

        async def remote(calls: Calls) -> None:
            for data in calls:
                await client.forward_backward(data, LOSS)
                await client.optim_step()

        ways: dict[str, Callable[[Calls], object]] = {
            TRL: trl.gradients,
            BARE: lambda calls: bare(local, calls),
            OURS: lambda calls: in_process(local, calls, sharing=True),
            SEPARATE: lambda calls: in_process(local, calls, sharing=False),
            STEPPED: lambda calls: with_steps(local, calls),
            REMOTE: remote,
        }
        found: dict[str, Rates] = {}
        for name, calls in batches.items():
            print(f"{name}: {rounds} rounds after one to warm up …", file=sys.stderr, flush=True)
            measures = {way: partial(_rate, work, calls) for way, work in ways.items()}
            await alternate(measures, 1)
            found[name] = await alternate(measures, rounds)
    return found, trl.rows


async def _rate(work: Callable[[Calls], object], calls: Calls) -> float:
    """Tokens per second, padding not counted."""
    tokens = sum(length(datum) for data in calls for datum in data)
    start = time.perf_counter()
    if (running := work(calls)) is not None:
        await running  # type: ignore[misc]
    return tokens / (time.perf_counter() - start)


def _best(model: Path, calls: Calls) -> TrlStep:
    """The fastest of TRL's sizes of a micro-batch, each tried once after one to warm up."""
    tried: list[tuple[float, TrlStep]] = []
    for rows in TRL_ROWS:
        step = TrlStep(model, rows)
        step.gradients(calls)
        start = time.perf_counter()
        step.gradients(calls)
        tried.append((time.perf_counter() - start, step))
    return min(tried, key=lambda one: one[0])[1]


def peaks(model: Path, batch: Path, rows: int) -> dict[str, int]:
    """Bytes, by the names of `PEAKS`."""
    return {
        name: peak.measured(way, model, batch, rows, rank, checkpointing=checkpointing)
        for name, (way, rank, checkpointing) in PEAKS.items()
    }


def report(found: Mapping[str, Rates], memory: Mapping[str, int], prefix: str = "") -> dict[str, float]:
    """Prints two tables. Returns the ratios, of the first kind of data under their plain names."""
    medians = {data: {way: median(values) for way, values in ways.items()} for data, ways in found.items()}
    print_table(
        ("data", "way", "tokens/s, median", "least–greatest", "of bare"),
        [
            (data, way, f"{medians[data][way]:,.0f}", spread(values), f"{medians[data][way] / medians[data][BARE]:.2f}")
            for data, ways in found.items()
            for way, values in ways.items()
        ],
    )
    print_table(
        ("two steps of", "raise the memory by, GB"), [(way, f"{size / 1e9:.2f}") for way, size in memory.items()]
    )
    ratios: dict[str, float] = {}
    for place, (data, rates) in enumerate(medians.items()):
        name = f"{prefix}{data.replace('-', '_').replace(' ', '_')}_" if place else prefix
        for ratio, way in (("trl", TRL), ("bare", BARE), ("prefix", SEPARATE)):
            ratios[f"{name}{ratio}_ratio"] = round(rates[OURS] / rates[way], 2)
        ratios[f"{name}grpc_ratio"] = round(rates[REMOTE] / rates[STEPPED], 2)
    ratios[f"{prefix}lora_memory_ratio"] = round(memory[LORA] / memory[FULL], 2)
    ratios[f"{prefix}lora_checkpointing_memory_ratio"] = round(memory[CHECKPOINTING] / memory[FULL], 2)
    ratios[f"{prefix}trl_memory_ratio"] = round(memory[FULL] / memory[TRL_FULL], 2)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sequences and rounds")
    parser.add_argument("--lm", type=Path, help="the folder of SmolLM2-135M")
    arguments = parser.parse_args()
    count, rounds = (64, 3) if arguments.quick else (256, 7)
    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    erl = recorded(ERL_DEMO)
    vocabulary = AutoConfig.from_pretrained(EMBEDDED).vocab_size
    batches: dict[str, Calls] = {
        "erl-demo": [erl],
        "dealt out": minibatches(erl, ERL_DEMO_MINIBATCHES, 0),
        "ragged": [ragged(count, vocabulary)],
    }
    with TemporaryDirectory() as folder:
        found, rows = asyncio.run(measure(Path(folder) / "demo", EMBEDDED, batches, rounds))
        ratios = report(found, peaks(EMBEDDED, ERL_DEMO, rows))
        if arguments.lm is not None:
            lm: dict[str, Calls] = {"erl-demo-lm": [recorded(ERL_DEMO_LM)]}
            found, rows = asyncio.run(measure(Path(folder) / "lm", arguments.lm, lm, 3))
            ratios |= report(found, peaks(arguments.lm, ERL_DEMO_LM, rows), "lm_")
    ratios |= rollouts.measure(quick=arguments.quick)
    print_result("learner", {**ratios, "sequences": count, "rounds": rounds, "torch": torch.__version__})


if __name__ == "__main__":
    main()
