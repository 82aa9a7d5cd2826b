"""Searches per second of HotpotQA through the service: `python -m benchmarks.search [--quick] [--passages N]`.

A server process on loopback searches the small built-in corpus and N passages of made-up words with Zipf frequencies.
Each of many concurrent episodes searches four times and then answers, through the coalescing client. The time of a step
is how long an agent waits for passages.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common import Language, percentile, print_result, print_table
from mulligan.common.channel import Endpoint
from mulligan.common.errors import CallFailed, DomainError
from mulligan.common.types import Outcome, Split
from mulligan.env.client import EnvClient, RemoteEpisode
from mulligan.env.envs.hotpotqa import world as hotpotqa_world
from mulligan.testing.processes import ServiceProcesses

SEARCHES = 4  # of an episode; the fifth turn is the answer
PASSAGE_WORDS = 70
CONCURRENT = (1, 64, 256, 512, 1024)
_ids = itertools.count()


def write_corpus(path: Path, passages: int) -> list[str]:
    """Writes the passages. Returns queries: eight consecutive words of a passage."""
    language = Language()
    rng = random.Random("passages")
    queries = []
    with path.open("w") as file:
        for number in range(passages):
            text = language.draw(rng, PASSAGE_WORDS)
            file.write(json.dumps({"title": f"Page {number}", "text": [text]}) + "\n")
            if number < 2_000:
                at = rng.randrange(PASSAGE_WORDS - 8)
                queries.append(" ".join(text.split()[at : at + 8]))
    return queries


async def play(episode: RemoteEpisode, queries: list[str], waits: list[float]) -> int:
    """Plays one episode. Returns 1 if the service failed, otherwise 0."""
    try:
        for query in queries:
            call = json.dumps({"name": "local_search", "arguments": {"query": query}})
            start = time.perf_counter()
            step = await episode.step(f"<tool_call>{call}</tool_call>")
            waits.append(time.perf_counter() - start)
            if "[Document 1]" not in step.observation:
                return 1
        return int((await episode.step(r"\boxed{no}")).outcome is not Outcome.COMPLETED)
    except (DomainError, CallFailed):
        return 1


async def measure(address: str, queries: list[str], rounds: int) -> dict[int, dict[str, float]]:
    client = EnvClient(Endpoint(address))
    (task,) = await client.list_tasks("hotpotqa", Split.TEST, 1)
    found: dict[int, dict[str, float]] = {}
    for concurrent in CONCURRENT:
        waits: list[float] = []
        errors = 0
        seconds = 0.0
        for _ in range(rounds if concurrent > 1 else 8 * rounds):
            episodes = [await client.start("hotpotqa", task.task_id, f"b{next(_ids)}") for _ in range(concurrent)]
            asked = itertools.cycle(random.Random(next(_ids)).sample(queries, len(queries)))
            start = time.perf_counter()
            errors += sum(
                await asyncio.gather(*(play(e, [next(asked) for _ in range(SEARCHES)], waits) for e in episodes))
            )
            seconds += time.perf_counter() - start
        found[concurrent] = {
            "searches_per_second": round(len(waits) / seconds),
            "p50_ms": round(percentile(waits, 50) * 1e3, 1),
            "p99_ms": round(percentile(waits, 99) * 1e3, 1),
            "errors": errors,
        }
    await client.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Searches per second.")
    parser.add_argument("--quick", action="store_true", help="20,000 passages, fewer rounds")
    parser.add_argument("--passages", type=int, default=0, help="made-up ones; 500,000, or 20,000 with --quick")
    arguments = parser.parse_args()
    passages = arguments.passages or (20_000 if arguments.quick else 500_000)
    with TemporaryDirectory() as name:
        folder = Path(name)
        hotpotqa_world.write(folder)
        queries = write_corpus(folder / "pages.jsonl", passages)
        table = {
            "kind": "hotpotqa",
            "test_file": str(folder / hotpotqa_world.TEST_FILE),
            "corpus": [str(folder / "pages.jsonl")],
        }
        services = ServiceProcesses(folder)
        try:
            start = time.perf_counter()
            server = services.start("env", environments={"hotpotqa": table})
            start_seconds = time.perf_counter() - start
            found = asyncio.run(measure(server.address, queries, 2 if arguments.quick else 5))
        finally:
            services.end()
    print_table(
        ["concurrent episodes", "searches/s", "p50 ms", "p99 ms", "errors"],
        [[f"{concurrent:,}", *(f"{value:,}" for value in row.values())] for concurrent, row in found.items()],
    )
    print_result("search", {"passages": passages, "start_seconds": round(start_seconds, 1), "concurrent": found})


if __name__ == "__main__":
    main()
