"""Checks of RunService that start no run: lists and refusals."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from mulligan.conformance.report import NotApplicable, Suite, demand
from mulligan.conformance.target import Refusal, all_pages, as_demanded
from mulligan.conformance.trainer.held import Trainer
from mulligan.trainer.v1 import run_config_pb2 as config_pb
from mulligan.trainer.v1 import run_service_pb2 as pb

suite: Suite[Trainer] = Suite()
NOWHERE = "no-such-environment"  # a run that is started by mistake soon fails


@suite.check("GetRun", "an unknown run is NOT_FOUND UNKNOWN_RUN, in every call")
async def unknown(trainer: Trainer) -> None:
    for run_id in (f"conformance-{uuid4().hex}", "", "../escape", "a\nb"):
        for method, request in (
            ("GetRun", pb.GetRunRequest(run_id=run_id)),
            ("StopRun", pb.StopRunRequest(run_id=run_id)),
            ("ResumeRun", pb.ResumeRunRequest(run_id=run_id)),
            ("ListExperiences", pb.ListExperiencesRequest(run_id=run_id)),
        ):
            await trainer.session.refused(method, request, "NOT_FOUND", "UNKNOWN_RUN")
        watch = pb.WatchRunRequest(run_id=run_id)
        answer: Any = await trainer.session.stream("WatchRun", watch, enough=1)
        as_demanded(answer, watch, "NOT_FOUND", "UNKNOWN_RUN")


@suite.check("StartRun", "a run_id that is no folder name is INVALID_ARGUMENT INVALID_FIELD")
async def bad_ids(trainer: Trainer) -> None:
    config = config_pb.RunConfig(environment=NOWHERE, steps=1)
    for run_id in ("", ".", "..", ".hidden", "-f", "a/b", "../a", "a b", "é", "a\n", "x" * 65):
        await trainer.session.bad_field("StartRun", pb.StartRunRequest(run_id=run_id, config=config), "run_id")


BAD_SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("environment", {"environment": ""}),
    ("steps", {"steps": 0}),
    ("seed", {"seed": -1}),
    ("checkpoint_every", {"checkpoint_every": 0}),
    ("rollout.temperature", {"rollout": {"temperature": 0}}),
    ("rollout.top_p", {"rollout": {"top_p": 1.5}}),
    ("evaluation.samples", {"evaluation": {"samples": 0}}),
    ("optimizer.learning_rate", {"optimizer": {"learning_rate": float("nan")}}),
    ("algorithm.memory_entries", {"algorithm": {"memory_entries": -1}}),
    ("model.dtype", {"model": {"dtype": "float16"}}),
    ("algorithm.success_threshold", {"algorithm": {"success_threshold": 1, "settings": {"success_threshold": 1}}}),
)


@suite.check("StartRun", "a bad setting is INVALID_ARGUMENT INVALID_SETTING, named, and starts nothing")
async def bad_settings(trainer: Trainer) -> None:
    run_id = f"conformance-{uuid4().hex}"
    for field, change in BAD_SETTINGS:
        request = pb.StartRunRequest(run_id=run_id, config=config_pb.RunConfig(**({"environment": NOWHERE} | change)))
        answer = await trainer.session.attempt("StartRun", request)
        if isinstance(answer, Refusal) and answer.reason == "LEARNER_OWNED":
            raise NotApplicable("the trainer trains a run, and may say that first")
        found = as_demanded(answer, request, "INVALID_ARGUMENT", "INVALID_SETTING", "field")
        demand(found.metadata["field"] == field, f"metadata `field` is {field!r}", found, request)
    await trainer.session.refused("GetRun", pb.GetRunRequest(run_id=run_id), "NOT_FOUND", "UNKNOWN_RUN")


@suite.check("ListRuns", "page by page it lists the runs, newest first")
async def pages(trainer: Trainer) -> None:
    request = pb.ListRunsRequest(page_size=1000)
    everything = list((await trainer.session.ask("ListRuns", request)).runs)
    times = [run.created_at.ToNanoseconds() for run in everything]
    demand(times == sorted(times, reverse=True), "created_at from the newest to the oldest", f"{times[:5]}", request)
    expected = [run.run_id for run in everything][:30]
    found: list[str] = []
    async for page in all_pages(
        lambda token: trainer.session.ask("ListRuns", pb.ListRunsRequest(page_size=2, page_token=token))
    ):
        demand(len(page.runs) <= 2, "a page of at most 2 runs", f"{len(page.runs)} runs")
        found += [run.run_id for run in page.runs]
        if len(found) >= len(expected):
            break
    demand(found[: len(expected)] == expected, f"the same runs in pages of 2, {expected}", found)
    for run in everything:
        demand(run.state != pb.RUN_STATE_UNSPECIFIED, "a state", run)
        told = bool(run.error) == (run.state == pb.RUN_STATE_FAILED)
        demand(told, "an error where the run is FAILED, and none otherwise", run)


@suite.check("ListRuns", "a bad page token or size is INVALID_ARGUMENT")
async def bad_pages(trainer: Trainer) -> None:
    for token in ("no such token", "é🧊", "-1/0", "\x00"):
        request = pb.ListRunsRequest(page_token=token)
        await trainer.session.refused("ListRuns", request, "INVALID_ARGUMENT", "BAD_PAGE_TOKEN")
    for size in (-1, 1001):
        await trainer.session.bad_field("ListRuns", pb.ListRunsRequest(page_size=size), "page_size")
    for size in (-1, 101):
        listed = pb.ListExperiencesRequest(run_id="conformance", page_size=size)
        await trainer.session.bad_field("ListExperiences", listed, "page_size")


@suite.check("WatchRun", "a negative event number is INVALID_ARGUMENT INVALID_FIELD")
async def bad_watch(trainer: Trainer) -> None:
    request = pb.WatchRunRequest(run_id="conformance", after_event=-1)
    answer: Any = await trainer.session.stream("WatchRun", request, enough=1)
    found = as_demanded(answer, request, "INVALID_ARGUMENT", "INVALID_FIELD", "field", "expected")
    demand(found.metadata["field"] == "after_event", "metadata `field` is 'after_event'", found, request)


@suite.check("Evaluate", "a bad field of an evaluation is refused and named")
async def bad_evaluations(trainer: Trainer) -> None:
    for field, request in (
        ("environment", pb.EvaluateRequest()),
        ("max_tokens", pb.EvaluateRequest(environment=NOWHERE, max_tokens=0)),
        ("seed", pb.EvaluateRequest(environment=NOWHERE, seed=-1)),
        ("policy", pb.EvaluateRequest(environment=NOWHERE, policy="p" * 65)),
    ):
        await trainer.session.bad_field("Evaluate", request, field)
    setting = pb.EvaluateRequest(environment=NOWHERE, config=config_pb.EvaluationConfig(samples=0))
    found = await trainer.session.refused("Evaluate", setting, "INVALID_ARGUMENT", "INVALID_SETTING", "field")
    demand(found.metadata["field"] == "samples", "metadata `field` is 'samples', within config", found, setting)
    unknown_run = pb.EvaluateRequest(environment=NOWHERE, run_id=f"conformance-{uuid4().hex}")
    answer = await trainer.session.attempt("Evaluate", unknown_run)
    refused = isinstance(answer, Refusal) and answer.reason in ("UNKNOWN_RUN", "UNKNOWN_ENVIRONMENT", "LEARNER_OWNED")
    if isinstance(answer, Refusal) and answer.reason == "SERVICE_UNAVAILABLE":
        raise NotApplicable(f"a service that the trainer needs stays away: {answer.message}")
    demand(refused, "NOT_FOUND UNKNOWN_RUN", answer, unknown_run)
