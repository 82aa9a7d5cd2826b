"""The policy service against the same engines called directly: `python -m benchmarks.policy [--quick]`.

Two engines, one after the other; of each, all ways sample the same number of tokens after the same number of prompt
tokens, in turn, in one run, with 1 to 256 callers at a time. The embedded engine: transformers' own `generate` over all
callers' prompts as one batch; the engine in this process; a service process over gRPC. SGLang: its own HTTP endpoint;
and a service process in front of the same server. The server is started by an interpreter that has SGLang
(`--sglang-python`, or MULLIGAN_TEST_SGLANG_PYTHON), or runs already (`--sglang`, or MULLIGAN_TEST_SGLANG; its model may
end a turn early, and tokens are counted as they come). Without either its figures are null.

On a CPU, a SGLang server computes on one core and polls there, with everything else on the others. `--device cuda
--shape 4b` measures a model of four billion parameters with random weights in bfloat16.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import shlex
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import print_result, print_table
from benchmarks.policy import shapes
from benchmarks.policy.load import CALLERS, Round
from benchmarks.policy.measure import EngineFigures, measure, measure_own_updates, measure_updates, rows
from benchmarks.policy.server import sglang_server
from benchmarks.policy.ways import SglangHttp, in_process, new_session, plain_generate, service
from mulligan.common.channel import Endpoint
from mulligan.policy.backends.transformers.backend import TransformersBackend
from mulligan.policy.client import PolicyClient
from mulligan.policy.config import PolicySettings
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.estimate.shapes import QWEN3_4B

EMBEDDED_WAYS = ["plain generate", "engine in process", "service"]
SGLANG_WAYS = ["SGLang", "service before SGLang"]
HEAD = ["way, callers", "tokens/s", "least–greatest", "of the first way", "p50 ms", "p99 ms", "first token ms"]


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    dtype = torch.bfloat16 if arguments.device != "cpu" else torch.float32
    found: dict[str, EngineFigures | None] = {"embedded": None, "sglang": None}
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = model_for(arguments, folder, dtype)
        if "embedded" in arguments.engines:
            found["embedded"] = asyncio.run(embedded(arguments, model, folder, dtype))
            free_memory()
        if "sglang" in arguments.engines:
            with running_server(arguments, model, folder) as (address, served):
                if address:
                    found["sglang"] = asyncio.run(sglang(arguments, address, served, folder, dtype))
    report(found, arguments)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--threads", type=int, default=max(1, torch.get_num_threads() // 2), help="torch threads of each way"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--callers", nargs="+", type=int, default=CALLERS, help="at a time; with it throughput alone is measured"
    )
    parser.add_argument("--shape", choices=["embedded", "4b"], default="embedded", help="what is measured")
    parser.add_argument("--model", type=Path, help="a model's folder instead of a shape")
    parser.add_argument("--engines", nargs="+", choices=["embedded", "sglang"], default=["embedded", "sglang"])
    parser.add_argument("--sglang-python", default=os.environ.get("MULLIGAN_TEST_SGLANG_PYTHON", ""))
    parser.add_argument("--sglang", metavar="URL", default="", help="a running server instead of one that is started")
    parser.add_argument(
        "--sglang-flags", type=shlex.split, default=[], help="further flags of the server, in one string"
    )
    arguments = parser.parse_args()
    if not arguments.sglang and not arguments.sglang_python:
        arguments.sglang = os.environ.get("MULLIGAN_TEST_SGLANG", "")
    arguments.rounds = 5 if arguments.quick else 21
    return arguments


def model_for(arguments: argparse.Namespace, folder: Path, dtype: torch.dtype) -> Path:
    if arguments.model is not None:
        return shapes.endless(arguments.model, folder)
    if arguments.shape == "4b":
        return shapes.random_model(folder, QWEN3_4B, arguments.device, dtype)
    return shapes.embedded(folder)


@contextmanager
def running_server(arguments: argparse.Namespace, model: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Its address, empty where there is none, and the model that it serves."""
    if arguments.sglang:
        address = arguments.sglang.rstrip("/")
        yield address, Path(asyncio.run(asked(address, "/model_info"))["model_path"])
    elif arguments.sglang_python:
        with sglang_server(
            arguments.sglang_python, model, folder, device=arguments.device, flags=arguments.sglang_flags
        ) as address:
            yield address, model
    else:
        yield "", model


async def asked(address: str, path: str) -> Any:
    async with new_session() as session:
        return await SglangHttp(session, address).get(path)


async def embedded(arguments: argparse.Namespace, path: Path, folder: Path, dtype: torch.dtype) -> EngineFigures:
    figures = EngineFigures(EMBEDDED_WAYS, arguments.callers)
    settings = {"model": str(path), "threads": arguments.threads, "device": arguments.device}
    async with AsyncExitStack() as stack:
        client = await service_client(stack, folder / "embedded", **settings)
        plain = (
            AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True).to(arguments.device).eval()
        )
        backend = TransformersBackend(PolicySettings.model_validate(settings))
        stack.push_async_callback(backend.close)
        size = backend.model.vocabulary_size
        assert not backend.model.end_of_turn_token_ids, "the engine samples as many tokens as plain generate"

        async def plainly(callers: int) -> Round:
            return plain_generate(plain, size, callers)

        await measure(
            figures, in_process(backend), service(client), {EMBEDDED_WAYS[0]: plainly}, size, arguments.rounds
        )
        if arguments.callers == CALLERS:
            await updates_of(figures, client, path, folder / "embedded", arguments, dtype)
    return figures


async def sglang(
    arguments: argparse.Namespace, address: str, path: Path, folder: Path, dtype: torch.dtype
) -> EngineFigures:
    figures = EngineFigures(SGLANG_WAYS, arguments.callers)
    async with AsyncExitStack() as outer:
        session = await outer.enter_async_context(new_session())
        server = SglangHttp(session, address)
        if arguments.sglang:
            outer.push_async_callback(server.post, "/update_weights_from_disk", model_path=str(path), flush_cache=True)
        async with AsyncExitStack() as stack:
            settings = {"backend": "sglang", "model": str(path), "sglang": {"servers": [address]}}
            client = await service_client(stack, folder / "sglang", **settings)
            size = (await client.info()).vocabulary_size
            await measure(figures, server.engine(), service(client), {}, size, arguments.rounds)
            if arguments.callers != CALLERS:
                return figures
            updates = await updates_of(figures, client, path, folder / "sglang", arguments, dtype)
        weights = [updates.following() for _ in range(2 * updates_per_case(arguments))]
        await measure_own_updates(figures, server, updates, weights, size)
    return figures


async def service_client(stack: AsyncExitStack, folder: Path, **settings: object) -> PolicyClient:
    """Of a service process that may load weights from below `folder / "weights"`."""
    (folder / "weights").mkdir(parents=True)
    services = ServiceProcesses(folder)
    stack.callback(services.end)
    start = partial(services.start, weights_folder=folder / "weights", state_folder=folder / "state")
    process = await asyncio.to_thread(start, "policy", **settings)
    client = PolicyClient(Endpoint(process.address))
    stack.push_async_callback(client.close)
    return client


async def updates_of(
    figures: EngineFigures,
    client: PolicyClient,
    path: Path,
    folder: Path,
    arguments: argparse.Namespace,
    dtype: torch.dtype,
) -> shapes.UpdateSeries:
    info = await client.info()
    updates = shapes.UpdateSeries(path, folder / "weights", info.fingerprint, dtype, arguments.device)
    await measure_updates(figures, client, updates, info.vocabulary_size, updates_per_case(arguments))
    return updates


def updates_per_case(arguments: argparse.Namespace) -> int:
    return 3 if arguments.quick else 7


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def report(found: dict[str, EngineFigures | None], arguments: argparse.Namespace) -> None:
    print_table(HEAD, [row for figures in found.values() if figures is not None for row in rows(figures)])
    values: dict[str, object] = {
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "device": arguments.device,
        "shape": str(arguments.model or arguments.shape),
    }
    for engine, figures in found.items():
        values |= flat(engine, figures)
        if figures is None and engine in arguments.engines:
            print(f"\n{engine}: not measured: neither an interpreter with SGLang nor the address of a server is given")
    print()
    print_result("policy", values)


def flat(engine: str, figures: EngineFigures | None) -> dict[str, object]:
    """The embedded engine's updates and added latency have no prefix."""
    prefix = "" if engine == "embedded" else f"{engine}_"
    if figures is None:
        absent = [f"{prefix}update_to_serving_s", f"{prefix}added_us_per_request"]
        return dict.fromkeys([*(f"{engine}_ratio_{callers}" for callers in CALLERS), *absent])
    service_way = figures.ways[-1]
    values: dict[str, object] = {}
    for callers in figures.callers:
        values[f"{engine}_ratio_{callers}"] = round(figures.ratio(service_way, callers), 3)
    for (way, callers), seconds in figures.first_token.items():
        kind = "service" if way == service_way else "direct"
        values[f"{engine}_first_token_ms_{kind}_{callers}"] = round(1e3 * sorted(seconds)[len(seconds) // 2], 1)
    return values | {f"{prefix}{name}": value for name, value in figures.values.items()}


if __name__ == "__main__":
    main()
