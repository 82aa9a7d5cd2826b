"""The learner against a bare forward and backward of the same model: `python -m benchmarks.learner [--quick]`.

Three ways compute the gradient over the same sequences, in turn, on one thread: transformers' own forward with
`labels`, in batches of similar length, without checks, metrics or a policy-gradient loss; the learner in this process;
and a learner behind gRPC on loopback. A sequence is like an episode: a prompt, then turns with a few sampled (trained)
tokens and the environment's tokens. Padding is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import structlog
import torch

from benchmarks.common import alternate, median, print_result, print_table, spread
from mulligan.common.channel import Endpoint
from mulligan.common.server import RequestInterceptor
from mulligan.models.build import write_untrained
from mulligan.trainer.data import Datum, Distillation, PolicyGradient
from mulligan.trainer.learner.batching import pack
from mulligan.trainer.learner.client import LearnerClient
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.servicer import LearnerServicer, add_to_server
from mulligan.trainer.learner.settings import LearnerServerSettings, LearnerSpec
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import TrainedModelSettings

LOSS = ppo.Settings(kl_coefficient=0.0)
# tokens of a turn; sampled tokens among them
TURN = 12
SAMPLED = 3


def episodes(count: int, vocabulary: int) -> list[Datum]:
    rng = random.Random(0)
    data: list[Datum] = []
    for index in range(count):
        prompt = rng.randint(50, 90)
        turns = rng.randint(4, 8)
        size = prompt + turns * TURN
        mask = tuple(place >= prompt and (place - prompt) % TURN < SAMPLED for place in range(size))
        rollout = tuple(-rng.uniform(4, 7) for _ in range(turns * SAMPLED))
        objective = Distillation(1.0) if index % 4 == 0 else PolicyGradient(rng.choice([-1.0, 1.0]), rollout)
        branch = "distilled" if index % 4 == 0 else "first"
        tokens = tuple(rng.randrange(vocabulary) for _ in range(size))
        data.append(Datum(str(index), tokens, mask, 1 / count, 1.0, objective, branch))
    return data


def bare(learner: Learner, data: list[Datum]) -> None:
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


async def measure(folder: Path, count: int, rounds: int) -> dict[str, list[float]]:
    """The tokens per second of each way in each round."""
    spec = LearnerSpec(TrainedModelSettings(source=str(write_untrained(folder / "model"))))
    settings = LearnerServerSettings(folder / "weights", folder / "checkpoints", threads=1)
    local = Learner("local", spec, settings)
    servicer = LearnerServicer(settings)
    server = grpc.aio.server(interceptors=[RequestInterceptor({})])
    add_to_server(server, servicer)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = await LearnerClient.create(Endpoint(f"127.0.0.1:{port}"), "remote", "benchmark", spec)
    data = episodes(count, local.model.limits.vocabulary_size)
    tokens = sum(len(datum.token_ids) for datum in data)

    async def plainly() -> float:
        start = time.perf_counter()
        bare(local, data)
        return tokens / (time.perf_counter() - start)

    async def in_process() -> float:
        start = time.perf_counter()
        local.forward_backward(data, LOSS)
        seconds = time.perf_counter() - start
        local.optim_step()
        return tokens / seconds

    async def over_grpc() -> float:
        start = time.perf_counter()
        await client.forward_backward(data, LOSS)
        seconds = time.perf_counter() - start
        await client.optim_step()
        return tokens / seconds

    try:
        ways = {"bare forward and backward": plainly, "learner": in_process, "learner over gRPC": over_grpc}
        await alternate(ways, 1)  # warm-up
        return await alternate(ways, rounds)
    finally:
        await client.close()
        await server.stop(None)
        await servicer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sequences and rounds")
    count, rounds = (64, 3) if parser.parse_args().quick else (256, 5)
    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with TemporaryDirectory() as folder:
        found = asyncio.run(measure(Path(folder), count, rounds))
    medians = {name: median(values) for name, values in found.items()}
    base = medians["bare forward and backward"]
    print_table(
        ("way", "tokens/s, median", "least–greatest", "of bare"),
        [
            (name, f"{medians[name]:,.0f}", spread(values), f"{medians[name] / base:.2f}")
            for name, values in found.items()
        ],
    )
    result = {name.replace(" ", "_"): round(value) for name, value in medians.items()}
    print_result("learner", result | {"sequences": count, "rounds": rounds, "torch": torch.__version__})


if __name__ == "__main__":
    main()
