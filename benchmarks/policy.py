"""Generate through the policy service against one plain batched `generate`: `python -m benchmarks.policy [--quick]`.

Three ways sample the same number of tokens after the same prompts, in turn, in one run: transformers' own `generate`
over all prompts as one batch; the service's engine in this process; and a service process over gRPC, with one caller
per prompt. The model is the embedded one without its end-of-turn token, so that nothing ends early. Prompts are random
and new in each round: no prefix is ever reused.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import models
from benchmarks.common import alternate, median, print_result, print_table, spread
from models.build import write_untrained
from services.common.channel import Endpoint
from services.common.types import SamplingParams
from services.policy.backends.transformers import TransformersBackend
from services.policy.client import PolicyClient
from services.policy.config import PolicySettings
from tests.support.processes import Services

PROMPT_TOKENS = 96
NEW_TOKENS = 32
CALLERS = (1, 8, 64)
SAMPLING = SamplingParams(temperature=1.0, max_tokens=NEW_TOKENS)
_rng = np.random.default_rng(0)


def endless_model(folder: Path) -> Path:
    """The embedded model, or its untrained shape, without a token that ends a turn."""
    path = folder / "model"
    if (models.EMBEDDED / "config.json").exists():
        shutil.copytree(models.EMBEDDED, path)
    else:
        write_untrained(path)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        file = path / name
        if file.exists():
            content = json.loads(file.read_text())
            file.write_text(
                json.dumps({key: content[key] for key in content if key not in ("eos_token", "eos_token_id")})
            )
    return path


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    tokens: list[list[int]] = _rng.integers(0, vocabulary, (count, PROMPT_TOKENS)).tolist()
    return tokens


async def plain(model: torch.nn.Module, vocabulary: int, callers: int) -> float:
    ids = torch.tensor(prompts(callers, vocabulary))
    start = time.perf_counter()
    output = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS, pad_token_id=0
    )
    seconds = time.perf_counter() - start
    assert output.shape[1] == PROMPT_TOKENS + NEW_TOKENS
    return callers * NEW_TOKENS / seconds


async def concurrent(
    generate: Callable[[list[int], SamplingParams], Awaitable[object]], vocabulary: int, callers: int
) -> float:
    asked = prompts(callers, vocabulary)
    start = time.perf_counter()
    await asyncio.gather(*(generate(prompt, SAMPLING) for prompt in asked))
    return callers * NEW_TOKENS / (time.perf_counter() - start)


async def measure(address: str, path: Path, threads: int, rounds: int) -> dict[str, list[float]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    backend = TransformersBackend(PolicySettings(model=str(path), threads=threads))
    client = PolicyClient(Endpoint(address))
    size = backend.info.vocabulary_size
    ways: dict[str, Callable[[], Awaitable[float]]] = {}
    for callers in CALLERS:
        ways[f"plain generate, {callers}"] = partial(plain, model, size, callers)
        ways[f"engine in process, {callers}"] = partial(concurrent, backend.generate, size, callers)
        ways[f"service, {callers}"] = partial(concurrent, client.generate, size, callers)
    await alternate(ways, 1)  # warms allocators and connections
    found = await alternate(ways, rounds)
    await client.close()
    await backend.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate through the service against a plain batched generate.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads of each way")
    arguments = parser.parse_args()
    rounds = 5 if arguments.quick else 21
    torch.set_num_threads(arguments.threads)
    with TemporaryDirectory() as folder:
        path = endless_model(Path(folder))
        services = Services(Path(folder))
        try:
            server = services.start("policy", model=path, threads=arguments.threads)
            found = asyncio.run(measure(server.address, path, arguments.threads, rounds))
        finally:
            services.end()
    rate = {way: median(values) for way, values in found.items()}
    print_table(
        ["way, callers", "tokens/s", "least–greatest", "of plain"],
        [
            [
                way,
                f"{rate[way]:,.0f}",
                spread(found[way]),
                f"{rate[way] / rate[f'plain generate, {way.split()[-1]}']:.2f}",
            ]
            for way in found
        ],
    )
    values: dict[str, object] = {"rounds": rounds, "threads": arguments.threads}
    for callers in CALLERS:
        base, engine, service = (
            rate[f"{way}, {callers}"] for way in ("plain generate", "engine in process", "service")
        )
        values[f"embedded_ratio_{callers}"] = round(service / base, 3)
        values[f"added_us_per_request_{callers}"] = round((1 / service - 1 / engine) * NEW_TOKENS * 1e6)
    print_result("policy", values)


if __name__ == "__main__":
    main()
