"""The cost of checking the constraints of StepEpisodes and Generate requests: `python -m benchmarks.validation`.

The first table is about the contracts. The second compares ways to check the same rules, on a contract of the same
shape that is declared here: with and without a rule per token id, and by hand-written Python, the fastest that a
checker in Python can be.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from grpc_tools import protoc

from mulligan.common.buf import validate_pb2
from mulligan.common.v1 import message_pb2
from mulligan.common.validation import prepare, violations
from mulligan.env.v1 import env_service_pb2
from mulligan.policy.v1 import policy_service_pb2

ROUNDS = 7
CALLS = 200
STEPS = 64
TOKENS = 2048
MESSAGES = 8
ACTION = "I think the goal is to the right. <answer>Right</answer> " * 4

CONTRACT = """
syntax = "proto3";
package mulligan_benchmark.v1;
import "buf/validate/validate.proto";
message Step {
  string episode_id = 1 [(buf.validate.field).string = {min_len: 1, max_len: 64}];
  int32 step_index = 2 [(buf.validate.field).int32.gte = 0];
  string action = 3 [(buf.validate.field).string.max_bytes = 1000000];
}
message StepEpisodes {
  repeated Step steps = 1 [(buf.validate.field).repeated = {min_items: 1, max_items: 1024}];
}
message TokensCounted {
  repeated int32 ids = 1 [(buf.validate.field).repeated = {min_items: 1, max_items: 1000000}];
}
message TokensEachChecked {
  repeated int32 ids = 1 [(buf.validate.field).repeated = {min_items: 1, items: {int32: {gte: 0}}}];
}
"""


def microseconds(call: Callable[[], object]) -> float:
    """The best of several rounds: a busy machine only adds time."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - start)
    return best / CALLS * 1e6


def row(name: str, request: Message, check: Callable[[Any], object] = violations) -> None:
    """Prints a line: the time to parse the request, and the time to check it."""
    assert not check(request), check(request)
    data = request.SerializeToString()
    parsing = microseconds(lambda: type(request).FromString(data))
    print(f"| {name} | {len(data):,} | {parsing:.1f} | {microseconds(lambda: check(request)):.1f} |")


def header(title: str) -> None:
    print(f"\n{title}\n\n| request | bytes | parse, µs | check, µs |\n|---|---|---|---|")


def declared_here() -> Callable[[str], Callable[..., Any]]:
    """Compiles CONTRACT and returns a look-up of its message classes."""
    proto = Path(__file__).resolve().parents[1] / "proto"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "benchmark.proto"
        image = Path(folder) / "image"
        source.write_text(CONTRACT)
        well_known = resources.files("grpc_tools") / "_proto"
        run = ["protoc", f"-I{folder}", f"-I{proto}", f"-I{well_known}", f"--descriptor_set_out={image}", str(source)]
        if protoc.main(run) != 0:
            raise SystemExit("protoc failed; its message is above")
        files = descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes()).file
    pool = descriptor_pool.Default()
    assert validate_pb2.DESCRIPTOR.pool is pool  # CONTRACT imports its rules from there
    for file in files:
        pool.AddSerializedFile(file.SerializeToString())
    return lambda name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"mulligan_benchmark.v1.{name}"))


def by_hand(request: Any) -> list[str]:
    """The rules of StepEpisodes in CONTRACT as plain Python."""
    if not 1 <= len(request.steps) <= 1024:
        return ["steps"]
    for index, step in enumerate(request.steps):
        if not 1 <= len(step.episode_id) <= 64:
            return [f"steps[{index}].episode_id"]
        if step.step_index < 0:
            return [f"steps[{index}].step_index"]
        if len(step.action.encode()) > 1000000:
            return [f"steps[{index}].action"]
    return []


def main() -> None:
    names = ("protovalidate", "protobuf")
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in names))

    start = time.perf_counter()
    prepare(["mulligan.env.v1.EnvService", "mulligan.policy.v1.PolicyService"])
    print(f"rules of two services compiled once, at the start, in {(time.perf_counter() - start) * 1e3:.1f} ms")

    steps = [{"episode_id": f"run/7/{i}", "step_index": i, "action": ACTION} for i in range(STEPS)]
    step_requests = [env_service_pb2.StepEpisodeRequest(**step) for step in steps]  # type: ignore[arg-type]
    chat = [message_pb2.Message(role=message_pb2.ROLE_USER, content=ACTION) for _ in range(MESSAGES)]
    generate = policy_service_pb2.GenerateRequest
    sampling = policy_service_pb2.SamplingParams(temperature=0.7, max_tokens=256)
    ids = policy_service_pb2.TokenIds(ids=range(TOKENS))
    header("The contracts")
    row(f"StepEpisodes, {STEPS} steps", env_service_pb2.StepEpisodesRequest(steps=step_requests))
    chat_prompt = policy_service_pb2.Messages(messages=chat)
    row(f"Generate, {MESSAGES} messages", generate(request_id="run/7/1", messages=chat_prompt, sampling=sampling))
    row(f"Generate, {TOKENS} token ids", generate(request_id="run/7/1", token_ids=ids, sampling=sampling))

    declared = declared_here()
    batch = declared("StepEpisodes")(steps=steps)
    header("Ways to check")
    row(f"{STEPS} steps, protovalidate", batch)
    row(f"{STEPS} steps, Python by hand", batch, by_hand)
    row(f"{TOKENS} token ids, their number checked", declared("TokensCounted")(ids=range(TOKENS)))
    row(f"{TOKENS} token ids, each one checked", declared("TokensEachChecked")(ids=range(TOKENS)))


if __name__ == "__main__":
    main()
