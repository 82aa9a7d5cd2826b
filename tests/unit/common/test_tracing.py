"""Spans and what goes along with calls, with OpenTelemetry's own recorder in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from mulligan.common import tracing
from mulligan.common.errors import CallFailed
from mulligan.policy.backends._servers.connection import new_session
from mulligan.policy.backends.sglang.connection import SglangConnection
from tests.support.endpoint import Reply, answer, asks, backend, chats, scripted

METHOD = "mulligan.env.v1.EnvService/StepEpisodes"
REMOTE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"


def recorder(ratio: float) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(ratio)), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.start_tracing(provider.get_tracer("test"), provider.shutdown)
    return exporter


@pytest.fixture
def recorded() -> Iterator[InMemorySpanExporter]:
    yield recorder(1.0)
    tracing.stop_tracing()


@pytest.fixture
def unrecorded() -> Iterator[InMemorySpanExporter]:
    yield recorder(0.0)
    tracing.stop_tracing()


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent is not None else None


def ids(*spans: ReadableSpan) -> list[int]:
    return [span.context.span_id for span in spans if span.context is not None]


def test_off_there_is_nothing() -> None:
    with tracing.root_span("run.step", run_id="a") as root, tracing.span("experience") as part:
        assert root is part is tracing.NO_SPAN
        call = tracing.client_span(METHOD, "127.0.0.1:1")
        assert call.carried(None) is None and call.carried((("a", "b"),)) == (("a", "b"),)
        assert tracing.origin() is None and tracing.headers() == {} and tracing.log_ids() == {}
        assert tracing.server_span(METHOD, (("traceparent", f"{REMOTE}01"),)).begin() is tracing.NO_SPAN
    assert not tracing.is_on()


def test_spans_are_parts_of_each_other(recorded: InMemorySpanExporter) -> None:
    root = tracing.root_span("run.step", run_id="a", step=3)
    with root:
        with tracing.span("experience", experience_id="x" * 1000):
            call = tracing.client_span(METHOD, "[::1]:50051")
            carried = call.carried((("authorization", "Bearer secret"),))
            call.end("NOT_FOUND")
        assert tracing.log_ids()["trace_id"] in str(carried)
    root.end()
    assert tracing.log_ids() == {}
    client, experience, step = recorded.get_finished_spans()
    assert [parent_of(one) for one in (step, experience, client)] == [None, *ids(step, experience)]
    assert dict(step.attributes or {}) == {"mulligan.run_id": "a", "mulligan.step": 3}
    assert len(str((experience.attributes or {})["mulligan.experience_id"])) <= tracing.ID_LENGTH
    assert dict(client.attributes or {}) == {
        "rpc.system.name": "grpc",
        "rpc.method": METHOD,
        "server.address": "[::1]",
        "server.port": 50051,
        "rpc.response.status_code": "NOT_FOUND",
        "error.type": "NOT_FOUND",
    }
    assert carried is not None and dict(carried)["traceparent"].split("-")[2] == f"{ids(client)[0]:016x}"


@pytest.mark.parametrize(
    ("status", "of_server", "of_client"),
    [("OK", False, False), ("NOT_FOUND", False, True), ("CANCELLED", False, False), ("INTERNAL", True, True)],
)
def test_whose_fault_a_status_is(recorded: InMemorySpanExporter, status: str, of_server: bool, of_client: bool) -> None:
    """https://opentelemetry.io/docs/specs/semconv/rpc/grpc/"""
    tracing.client_span(METHOD, "a:1").end(status)
    tracing.server_span(METHOD, None).end(status)
    client, server = recorded.get_finished_spans()
    assert [server.status.is_ok, client.status.is_ok] == [not of_server, not of_client]


async def test_of_an_error_only_the_type_is_recorded(recorded: InMemorySpanExporter) -> None:
    with pytest.raises(CallFailed), tracing.span("attempt"):
        raise CallFailed("127.0.0.1:1", "Call", "INTERNAL", "quotes a prompt")
    with pytest.raises(asyncio.CancelledError), tracing.span("attempt"):
        raise asyncio.CancelledError
    failed, cancelled = recorded.get_finished_spans()
    assert dict(failed.attributes or {}) == {"error.type": "CallFailed"} and not failed.status.is_ok
    assert not failed.events and "prompt" not in failed.to_json()
    assert cancelled.status.is_ok and not cancelled.attributes


def origins(count: int, root: tracing.Span) -> tuple[list[tracing.Origin], list[tracing.Span]]:
    found, opened = [], []
    with root:
        for number in range(count):
            part = tracing.span("episode.step", step_index=number)
            with part:
                one = tracing.origin()
                assert one is not None
                found.append(one)
            opened.append(part)
    return found, opened


def test_a_call_for_several_belongs_to_their_root_and_is_linked_with_each(recorded: InMemorySpanExporter) -> None:
    root = tracing.root_span("run.step")
    found, _ = origins(3, root)
    tracing.client_span(METHOD, "a:1", found).end("OK")
    root.end()
    *parts, call, step = recorded.get_finished_spans()
    assert parent_of(call) == ids(step)[0]
    assert [link.context.span_id for link in call.links] == ids(*parts)
    assert (call.attributes or {})["mulligan.batch_size"] == 3


def test_a_call_for_several_traces_is_one_of_its_own(recorded: InMemorySpanExporter) -> None:
    found = [*origins(1, tracing.root_span("run.step"))[0], *origins(1, tracing.root_span("run.step"))[0]]
    tracing.client_span(METHOD, "a:1", found).end("OK")
    *parts, call = recorded.get_finished_spans()
    assert parent_of(call) is None and [link.context.span_id for link in call.links] == ids(*parts)


def test_a_call_for_one_is_its_part(recorded: InMemorySpanExporter) -> None:
    found, _ = origins(1, tracing.root_span("run.step"))
    tracing.client_span(METHOD, "a:1", found).end("OK")
    part, call = recorded.get_finished_spans()
    assert parent_of(call) == ids(part)[0] and not call.links


def test_what_is_not_recorded_says_so_to_others(unrecorded: InMemorySpanExporter) -> None:
    root = tracing.root_span("run.step")
    with root:
        assert tracing.span("experience") is tracing.NO_SPAN
        one = tracing.origin()
        assert one is not None
        for asked in ([], [one], [one, one]):
            carried = tracing.client_span(METHOD, "a:1", asked).carried(())
            assert carried is not None and dict(carried)["traceparent"].endswith(("-00", "-02"))
        assert tracing.headers()["traceparent"].split("-")[1] == tracing.log_ids()["trace_id"]
    root.end()
    followed = tracing.server_span(METHOD, (("traceparent", f"{REMOTE}00"),))
    with followed:
        assert tracing.log_ids()["trace_id"] == REMOTE.split("-")[1]
        assert tracing.span("engine.generate") is tracing.NO_SPAN
    tracing.server_span(METHOD, (("traceparent", f"{REMOTE}01"),)).end("OK")
    (caller_wants_it,) = recorded_names(unrecorded)
    assert caller_wants_it == METHOD


def recorded_names(exporter: InMemorySpanExporter) -> Sequence[str]:
    return [span.name for span in exporter.get_finished_spans()]


async def test_a_task_that_outlives_its_span_is_no_part_of_it(recorded: InMemorySpanExporter) -> None:
    async def work() -> None:
        with tracing.span("check"):
            pass

    with tracing.root_span("run.step"):
        await asyncio.create_task(work(), context=tracing.untraced())
    (check,) = recorded.get_finished_spans()
    assert parent_of(check) is None


async def test_the_headers_reach_an_openai_endpoint(recorded: InMemorySpanExporter) -> None:
    async with scripted(chats(answer())) as endpoint, backend(endpoint) as opened:
        await opened.generate(asks())
        with tracing.span("engine.generate"):
            await opened.generate(asks())
    (span,) = recorded.get_finished_spans()
    before, within = [asked.headers for asked in endpoint.asked if asked.method == "POST"]
    assert "traceparent" not in before
    assert within["traceparent"].split("-")[2] == f"{ids(span)[0]:016x}" and within["authorization"]


@asynccontextmanager
async def engine(address: str) -> AsyncIterator[SglangConnection]:
    session = new_session()
    try:
        yield SglangConnection(session, address)
    finally:
        await session.close()


async def test_the_headers_reach_a_server_of_an_engine(recorded: InMemorySpanExporter) -> None:
    def reply(asked: object) -> Reply:
        return Reply({"text": ""})

    async with scripted(reply) as endpoint, engine(f"http://127.0.0.1:{endpoint.port}") as connection:
        await connection.generate(b"{}", 10.0)
        with tracing.span("engine.generate"):
            await connection.generate(b"{}", 10.0)
    (span,) = recorded.get_finished_spans()
    before, within = [asked.headers for asked in endpoint.asked]
    assert "traceparent" not in before
    assert within["traceparent"].split("-")[2] == f"{ids(span)[0]:016x}"
    assert within["content-type"] == "application/json"
