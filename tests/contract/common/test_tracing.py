"""Traces of one service: where they go, what they hold, and what happens where they cannot go anywhere."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from mulligan.common.certificates import Certificates
from mulligan.common.channel import Endpoint
from mulligan.env.client import EnvClient
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.testing.processes import ProcessFailed, ServiceProcess, ServiceProcesses
from tests.support.collector import Collector, collector
from tests.support.imports import modules_after

LISTING = "mulligan.env.v1.EnvService/ListEnvironments"
TRACE = "0af7651916cd43dd8448eb211c80319c"
FAST = {"OTEL_BSP_SCHEDULE_DELAY": "100"}  # milliseconds between two exports


async def list_with(address: str, *metadata: tuple[str, str]) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(f"/{LISTING}", pb.ListEnvironmentsRequest.SerializeToString, bytes)
        await call(pb.ListEnvironmentsRequest(), metadata=metadata)


def start(services: ServiceProcesses, collected: Collector, **settings: Any) -> ServiceProcess:
    return services.start("env", environment=FAST, otlp_endpoint=f"http://{collected.address}", **settings)


async def test_a_call_belongs_to_the_trace_of_its_caller(services: ServiceProcesses) -> None:
    with collector() as collected:
        env = start(services, collected)
        await list_with(env.address, ("traceparent", f"00-{TRACE}-b7ad6b7169203331-01"))
        (span,) = collected.wait(lambda spans: len(spans) >= 1)
        assert (span.service, span.name, span.kind) == ("mulligan-env", LISTING, 2)
        assert (span.trace_id, span.parent_id) == (TRACE, "b7ad6b7169203331")
        assert span.attributes == {
            "rpc.system.name": "grpc",
            "rpc.method": LISTING,
            "rpc.response.status_code": "OK",
        }
        (line,) = [line for line in env.log_lines if line["event"] == "request"]
        assert (line["trace_id"], line["span_id"]) == (TRACE, span.span_id)


async def test_a_caller_that_does_not_record_is_followed(services: ServiceProcesses) -> None:
    """The flags of a traceparent say whether its trace is recorded."""
    with collector() as collected:
        env = start(services, collected)
        await list_with(env.address, ("traceparent", f"00-{TRACE}-b7ad6b7169203331-00"))
        await list_with(env.address)
        assert env.stop() == 0
        (span,) = collected.spans
        assert span.trace_id != TRACE and span.parent_id == ""


@pytest.mark.parametrize("value", ["", "x" * 3000, "00-zz-b7-01", f"00-{TRACE}-0000000000000000-01"])
async def test_what_is_no_traceparent_is_ignored(services: ServiceProcesses, value: str) -> None:
    with collector() as collected:
        env = start(services, collected)
        await list_with(env.address, ("traceparent", value), ("tracestate", "=,,=" * 20))
        (span,) = collected.wait(lambda spans: len(spans) >= 1)
        assert span.parent_id == ""


async def test_no_trace_begins_at_ratio_0(services: ServiceProcesses) -> None:
    with collector() as collected:
        env = start(services, collected, trace_ratio=0)
        await list_with(env.address)
        await list_with(env.address, ("traceparent", f"00-{TRACE}-b7ad6b7169203331-01"))
        assert env.stop() == 0
        assert [span.trace_id for span in collected.spans] == [TRACE], "the caller's is recorded, as it wants"


async def test_refused_callers_and_probes_make_no_spans(services: ServiceProcesses, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    (tokens / "reader").write_text("a-token-that-is-long-enough-for-it\n")
    (tokens / "reader").chmod(0o600)
    with collector() as collected:
        env = start(services, collected, tokens_folder=tokens)
        with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
            await list_with(env.address, ("traceparent", f"00-{TRACE}-b7ad6b7169203331-01"))
        assert env.is_healthy()
        await list_with(env.address, ("authorization", "Bearer a-token-that-is-long-enough-for-it"))
        assert env.stop() == 0
        assert len(collected.spans) == 1
        assert not [raw for raw in collected.raw if b"long-enough" in raw]


async def test_a_collector_that_is_away_delays_nothing_and_is_named_once(services: ServiceProcesses) -> None:
    with collector() as collected:
        address = collected.address
    env = services.start(
        "env",
        environment={
            **FAST,
            "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
            "OTEL_BSP_MAX_QUEUE_SIZE": "16",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8",
        },
        otlp_endpoint=f"http://{address}",
    )
    client = EnvClient(Endpoint(env.address))
    await client.list_environments()
    deadline = time.monotonic() + 60
    calls = 0
    while calls < 300 or not away(env):
        await client.list_environments()
        calls += 1
        assert time.monotonic() < deadline
    for _ in range(100):  # more than the queue holds
        await client.list_environments()
    with collector(address) as back:
        while not back.spans:
            await client.list_environments()
            assert time.monotonic() < deadline
        await client.close()
        ended = time.monotonic()
        assert env.stop() == 0
        assert time.monotonic() - ended < 15
    told = [line["event"] for line in env.log_lines if "collector" in line or "opentelemetry" in line.get("logger", "")]
    assert told == ["traces", "the collector takes no spans; they are lost", "the collector takes spans again"]
    (line,) = away(env)
    assert line["level"] == "warning" and "UNAVAILABLE" in line["cause"]


def away(env: ServiceProcess) -> list[dict[str, str]]:
    return [line for line in env.log_lines if line["event"] == "the collector takes no spans; they are lost"]


async def test_spans_go_over_tls(services: ServiceProcesses, tmp_path: Path) -> None:
    """As docker/compose.observe.yaml has it: a certificate of `mulligan certs --other`, and its authority."""
    Certificates(tmp_path, others=["localhost"]).update()
    trust = {**FAST, "OTEL_EXPORTER_OTLP_CERTIFICATE": str(tmp_path / "services" / "env" / "ca.crt")}
    with collector(tls=tmp_path / "others" / "localhost") as collected:
        address = collected.address.replace("127.0.0.1", "localhost")
        env = services.start("env", environment=trust, otlp_endpoint=f"https://{address}")
        await list_with(env.address)
        (span,) = collected.wait(lambda spans: len(spans) >= 1)
        assert span.name == LISTING and not away(env)
        strange = services.start(
            "env", environment={**FAST, "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}, otlp_endpoint=f"https://{address}"
        )
        await list_with(strange.address)
        deadline = time.monotonic() + 60
        while not away(strange):
            await asyncio.sleep(0.1)
            assert time.monotonic() < deadline
        assert len(collected.spans) == 1, "a collector of an unknown authority gets nothing"


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "http://127.0.0.1", "http://u@127.0.0.1:4317", "ftp://a:1"])
def test_a_bad_endpoint_is_refused(services: ServiceProcesses, endpoint: str) -> None:
    with pytest.raises(ProcessFailed, match=r"otlp_endpoint: expected http://HOST:PORT or https://HOST:PORT"):
        services.start("env", otlp_endpoint=endpoint)


def test_a_protocol_that_is_not_spoken_is_refused(services: ServiceProcesses) -> None:
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    }
    with pytest.raises(ProcessFailed, match=r"OTEL_EXPORTER_OTLP_PROTOCOL: expected grpc.* not http/protobuf"):
        services.start("env", environment=variables)


def test_variables_that_contradict_each_other_are_refused(services: ServiceProcesses) -> None:
    with pytest.raises(ProcessFailed, match=r"OTEL_…: max_export_batch_size must be less"):
        services.start("env", environment={"OTEL_BSP_MAX_QUEUE_SIZE": "16"}, otlp_endpoint="http://127.0.0.1:4317")


async def test_opentelemetrys_variables_count(services: ServiceProcesses) -> None:
    with collector() as collected:
        variables = {
            **FAST,
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collected.address}",
            "OTEL_SERVICE_NAME": "games",
        }
        env = services.start("env", environment=variables)
        await list_with(env.address)
        (span,) = collected.wait(lambda spans: len(spans) >= 1)
        assert span.service == "games"
        quiet = services.start("env", environment={**variables, "OTEL_SDK_DISABLED": "true"})
        await list_with(quiet.address)
        assert quiet.stop() == 0 and not [line for line in quiet.log_lines if line["event"] == "traces"]


@pytest.mark.long
def test_nothing_of_opentelemetry_is_imported_while_tracing_is_off() -> None:
    for name in ("env", "memory", "policy", "trainer"):
        loaded = modules_after(f"import mulligan.{name}.__main__")
        assert "mulligan.common.tracing" in loaded
        assert not [module for module in loaded if module.partition(".")[0] == "opentelemetry"]


WITHOUT = """
import sys
sys.modules["opentelemetry"] = None
sys.argv[0] = "env"
from mulligan.env.__main__ import main
main()
"""


def test_without_the_packages_a_setting_is_refused_and_a_variable_is_not(services: ServiceProcesses) -> None:
    endpoint = "http://127.0.0.1:4317"
    with pytest.raises(ProcessFailed, match=r"otlp_endpoint: traces need the extra 'otel'"):
        services.start("env", program=["-c", WITHOUT], otlp_endpoint=endpoint)
    env = services.start("env", program=["-c", WITHOUT], environment={"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
    (line,) = [line for line in env.log_lines if line["event"] == "no traces"]
    assert "pip install" in line["cause"]
