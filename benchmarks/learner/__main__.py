"""The learner against a bare training loop of the same model: `python -m benchmarks.learner [--quick] [--model DIR]`.

Four ways compute the gradient over the same data, in turn, on one thread: transformers' own forward with `labels`, in
batches of similar length, without checks, metrics or a policy-gradient loss; the learner in this process, which
computes shared prefixes once; the same without that; and a learner behind gRPC on loopback. The data are a step of ERL
as the demo trained on it (in one call, and dealt out over its optimizer steps), and sequences that share nothing.
Padding is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import structlog
import torch

from benchmarks.common import alternate, median, print_result, print_table, spread
from benchmarks.learner.batches import ERL_DEMO, ERL_DEMO_MINIBATCHES, ragged, recorded
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
BARE, OURS, SEPARATE, REMOTE = "bare loop", "learner", "learner without sharing", "learner over gRPC"
Calls = Sequence[list[Datum]]


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


async def serve(stack: AsyncExitStack, settings: LearnerServerSettings, spec: LearnerSpec) -> LearnerClient:
    servicer = LearnerServicer(settings)
    server = grpc.aio.server(interceptors=[RequestInterceptor({})])
    add_to_server(server, servicer)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stack.push_async_callback(servicer.close)
    stack.push_async_callback(server.stop, None)
    client = await LearnerClient.create(Endpoint(f"127.0.0.1:{port}"), "remote", "benchmark", spec)
    stack.push_async_callback(client.close)
    return client


async def measure(folder: Path, model: Path, count: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """The tokens per second of each way in each round, for each kind of data."""
    # With a learning rate of 0 each way and round computes the same.
    spec = LearnerSpec(TrainedModelSettings(source=str(model)))
    spec = replace(spec, optimizer=spec.optimizer.model_copy(update={"learning_rate": 0.0}))
    settings = LearnerServerSettings(folder / "weights", folder / "checkpoints", threads=1)
    local = Learner("local", spec, settings)
    erl = recorded(ERL_DEMO)
    batches: dict[str, Calls] = {
        "erl-demo": [erl],
        "erl-demo dealt out": minibatches(erl, ERL_DEMO_MINIBATCHES, 0),
        "ragged": [ragged(count, local.model.limits.vocabulary_size)],
    }
    async with AsyncExitStack() as stack:
        client = await serve(stack, settings, spec)

        async def remote(calls: Calls) -> None:
            for data in calls:
                await client.forward_backward(data, LOSS)
                await client.optim_step()

        found: dict[str, dict[str, list[float]]] = {}
        for name, calls in batches.items():
            tokens = sum(length(datum) for data in calls for datum in data)

            async def timed(work: Callable[[Calls], object], calls: Calls = calls, tokens: int = tokens) -> float:
                start = time.perf_counter()
                if (running := work(calls)) is not None:
                    await running  # type: ignore[misc]
                return tokens / (time.perf_counter() - start)

            ways: dict[str, Callable[[Calls], object]] = {
                BARE: lambda calls: bare(local, calls),
                OURS: lambda calls: in_process(local, calls, sharing=True),
                SEPARATE: lambda calls: in_process(local, calls, sharing=False),
                REMOTE: remote,
            }
            measures = {way: (lambda work=work: timed(work)) for way, work in ways.items()}
            await alternate(measures, 1)  # warm-up
            found[name] = await alternate(measures, rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sequences and rounds")
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="its folder; the embedded model unless given")
    arguments = parser.parse_args()
    count, rounds = (64, 3) if arguments.quick else (256, 7)
    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with TemporaryDirectory() as folder:
        found = asyncio.run(measure(Path(folder), arguments.model, count, rounds))
    medians = {data: {way: median(values) for way, values in ways.items()} for data, ways in found.items()}
    print_table(
        ("data", "way", "tokens/s, median", "least–greatest", "of bare"),
        [
            (data, way, f"{medians[data][way]:,.0f}", spread(values), f"{medians[data][way] / medians[data][BARE]:.2f}")
            for data, ways in found.items()
            for way, values in ways.items()
        ],
    )

    def ratio(data: str, way: str) -> float:
        return round(medians[data][OURS] / medians[data][way], 2)

    result = {
        "prefix_ratio": ratio("erl-demo", SEPARATE),
        "bare_ratio": ratio("erl-demo", BARE),
        "dealt_out_prefix_ratio": ratio("erl-demo dealt out", SEPARATE),
        "dealt_out_bare_ratio": ratio("erl-demo dealt out", BARE),
        "ragged_bare_ratio": ratio("ragged", BARE),
        "grpc_ratio": round(medians["erl-demo"][REMOTE] / medians["erl-demo"][OURS], 2),
        "sequences": count,
        "rounds": rounds,
        "torch": torch.__version__,
    }
    print_result("learner", result)


if __name__ == "__main__":
    main()
