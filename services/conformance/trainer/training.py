"""Checks of runs: started, watched, stopped and resumed. Runs stay in the trainer's list, so this needs `--writes`."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from uuid import uuid4

from mulligan.common.v1 import experience_pb2, outcome_pb2
from mulligan.conformance.report import NotApplicable, Suite, Violation, demand
from mulligan.conformance.target import Refusal, all_pages
from mulligan.conformance.trainer.held import Trainer
from mulligan.trainer.v1 import run_config_pb2 as config_pb
from mulligan.trainer.v1 import run_service_pb2 as pb

suite: Suite[Trainer] = Suite()
LONG = 1_000_000  # steps that no run takes before it is stopped
PREFIX = "conformance-"
POLL_SECONDS = 0.3
_WITH_REWARD = (outcome_pb2.OUTCOME_COMPLETED, outcome_pb2.OUTCOME_TRUNCATED)


def request_of(trainer: Trainer, **changes: Any) -> pb.StartRunRequest:
    """The request to start a new run, which is stopped after the check."""
    trainer.may_write()
    config = config_pb.RunConfig()
    if trainer.options.config is not None:
        config.CopyFrom(trainer.options.config)
    config.MergeFrom(config_pb.RunConfig(**changes))
    run_id = f"{PREFIX}{uuid4().hex[:12]}"
    trainer.session.later("StopRun", pb.StopRunRequest(run_id=run_id))
    return pb.StartRunRequest(run_id=run_id, config=config)


async def start(trainer: Trainer, request: pb.StartRunRequest) -> pb.Run:
    """Starts a run. If an earlier check's run is still stopping, it waits. Another run raises NotApplicable."""
    began = time.monotonic()
    while True:
        answer = await trainer.session.attempt("StartRun", request)
        if not isinstance(answer, Refusal):
            run: pb.Run = answer.run
            return run
        if answer.reason != "LEARNER_OWNED":
            raise Violation("this run is started", answer, request)
        owner = answer.metadata.get("run_id", "")
        demand(bool(owner), "metadata `run_id`, of the run that the server trains", answer, request)
        if not owner.startswith(PREFIX) or time.monotonic() - began > trainer.options.run_seconds:
            raise NotApplicable(f"the trainer trains another run: {answer.message}")
        await asyncio.sleep(POLL_SECONDS)


async def watch(trainer: Trainer, run_id: str, after: int = 0) -> list[pb.RunEvent]:
    """The events until the run has ended."""
    request = pb.WatchRunRequest(run_id=run_id, after_event=after)
    found: Any = await trainer.session.stream("WatchRun", request, timeout=trainer.options.run_seconds)
    if isinstance(found, Refusal):
        raise Violation("the events of the run, and an end when it has ended", found, request)
    return [message.event for message in found]


async def get(trainer: Trainer, run_id: str) -> pb.Run:
    run: pb.Run = (await trainer.session.ask("GetRun", pb.GetRunRequest(run_id=run_id))).run
    return run


async def trained(trainer: Trainer) -> pb.Run:
    """A completed run. All checks use the same one."""
    trainer.may_write()
    if trainer.untrainable:
        raise NotApplicable(f"no run could be completed: {trainer.untrainable}")
    if trainer.trained is None:
        request = request_of(trainer)
        await start(trainer, request)
        await watch(trainer, request.run_id)
        run = await get(trainer, request.run_id)
        if run.state != pb.RUN_STATE_COMPLETED:
            trainer.untrainable = run.error or str(pb.RunState.Name(run.state))
            raise NotApplicable(f"the run could not be completed: {trainer.untrainable}")
        trainer.trained = run
    return trainer.trained


@suite.check("StartRun", "a repeated StartRun returns the run; with other settings it is RUN_CONFLICT")
async def once(trainer: Trainer) -> None:
    request = request_of(trainer, steps=LONG)
    run = await start(trainer, request)
    demand(run.run_id == request.run_id, "the run that was asked for", run, request)
    demand(run.config.HasField("seed") and run.config.steps == LONG, "settings as used, defaults filled in", run)
    again = await trainer.session.ask("StartRun", request)
    demand(again.run.run_id == request.run_id, "the same run", again, request)
    other = pb.StartRunRequest(run_id=request.run_id, config=request.config)
    other.config.steps -= 1
    await trainer.session.refused("StartRun", other, "ALREADY_EXISTS", "RUN_CONFLICT")


@suite.check("StopRun", "a run stops after its step, and only ResumeRun continues it")
async def stop_and_resume(trainer: Trainer) -> None:
    await trained(trainer)  # where none can be completed, there is nothing to stop
    request = request_of(trainer, steps=LONG)
    await start(trainer, request)
    stop = pb.StopRunRequest(run_id=request.run_id)
    for _ in range(2):
        await trainer.session.ask("StopRun", stop)
    events = await watch(trainer, request.run_id)
    last = events[-1] if events else None
    stopped = last is not None and last.state_changed.state == pb.RUN_STATE_STOPPED
    demand(stopped, "the run STOPPED, as the last event", last or "no events", stop)
    same = await trainer.session.ask("StartRun", request)
    demand(same.run.state == pb.RUN_STATE_STOPPED, "an ended run as it is: StartRun does not take it up", same, request)
    resume = pb.ResumeRunRequest(run_id=request.run_id)
    for _ in range(2):
        resumed = (await trainer.session.ask("ResumeRun", resume)).run
        demand(resumed.state == pb.RUN_STATE_RUNNING, "the run RUNNING again", resumed, resume)
    await trainer.session.ask("StopRun", stop)
    more = await watch(trainer, request.run_id, len(events))
    ended = bool(more) and more[-1].state_changed.state == pb.RUN_STATE_STOPPED
    demand(ended, "the events after the resumption, with STOPPED as the last", more[-1] if more else "no events", stop)


@suite.check("WatchRun", "events are numbered from 1, and a stream can begin after any of them")
async def events_replay(trainer: Trainer) -> None:
    run = await trained(trainer)
    events = await watch(trainer, run.run_id)
    numbers = [event.number for event in events]
    demand(numbers == list(range(1, len(events) + 1)), "numbers from 1 on", numbers)
    steps = [event.step_completed.step for event in events if event.HasField("step_completed")]
    demand(len(steps) == run.step == run.config.steps, f"{run.config.steps} steps completed", f"{steps}", run)
    completed = events[-1].state_changed.state == pb.RUN_STATE_COMPLETED
    demand(completed, "the run COMPLETED, as the last event", events[-1])
    for after in {1, len(events) // 2, len(events)}:
        began = time.monotonic()
        rest = await watch(trainer, run.run_id, after)
        demand(rest == events[after:], f"the events after {after}", f"{[event.number for event in rest]}")
        demand(time.monotonic() - began < trainer.session.target.timeout, "an end, as the run has ended", "none")


@suite.check("ResumeRun", "resuming a completed run is RUN_COMPLETED, and StopRun does not change it")
async def completed_stays(trainer: Trainer) -> None:
    run = await trained(trainer)
    resume = pb.ResumeRunRequest(run_id=run.run_id)
    await trainer.session.refused("ResumeRun", resume, "FAILED_PRECONDITION", "RUN_COMPLETED")
    after = (await trainer.session.ask("StopRun", pb.StopRunRequest(run_id=run.run_id))).run
    demand(after.state == pb.RUN_STATE_COMPLETED, "the run COMPLETED as before", after)
    listed = [found.run_id for found in (await trainer.session.ask("ListRuns", pb.ListRunsRequest())).runs]
    demand(run.run_id in listed, f"{run.run_id} among the newest runs", listed)


@suite.check("ListExperiences", "page by page it lists the experiences by step, task and rollout, or those of one step")
async def experiences(trainer: Trainer) -> None:
    run = await trained(trainer)
    found = await _experiences(trainer, run.run_id, 3)
    ids = [experience.experience_id for experience in found]
    demand(bool(ids) and len(set(ids)) == len(ids), "experiences, each once", ids)
    order = [experience.step for experience in found]
    demand(order == sorted(order), "in the order of the steps", order)
    whole = [experience.experience_id for experience in await _experiences(trainer, run.run_id, 100)]
    demand(whole == ids, "the same in pages of any size", f"{whole}, not {ids}")
    first = await _experiences(trainer, run.run_id, 100, step=0)
    demand(all(experience.step == 0 for experience in first), "those of step 0 alone", f"{len(first)} experiences")
    demand(not await _experiences(trainer, run.run_id, 100, step=run.step + 5), "none of a later step", "some")
    bad = pb.ListExperiencesRequest(run_id=run.run_id, page_token="no such token")
    await trainer.session.refused("ListExperiences", bad, "INVALID_ARGUMENT", "BAD_PAGE_TOKEN")


async def _experiences(trainer: Trainer, run_id: str, size: int, **step: int) -> list[experience_pb2.Experience]:
    found: list[experience_pb2.Experience] = []

    async def ask(token: str) -> pb.ListExperiencesResponse:
        request = pb.ListExperiencesRequest(run_id=run_id, page_size=size, page_token=token, **step)
        page: pb.ListExperiencesResponse = await trainer.session.ask("ListExperiences", request)
        return page

    async for page in all_pages(ask):
        demand(len(page.experiences) <= size, f"a page of at most {size}", f"{len(page.experiences)}")
        demand(bool(page.experiences) or not page.next_page_token, "no page token after an empty page", page)
        found += page.experiences
    return found


@suite.check(
    "ListExperiences",
    "an attempt has a reward if and only if it was COMPLETED or TRUNCATED, and its segments are valid",
)
async def attempts(trainer: Trainer) -> None:
    run = await trained(trainer)
    for experience in await _experiences(trainer, run.run_id, 100):
        tried = [experience.first_attempt]
        tried += [experience.second_attempt] if experience.HasField("second_attempt") else []
        for attempt in tried:
            name = str(outcome_pb2.Outcome.Name(attempt.outcome))
            right = attempt.HasField("reward") == (attempt.outcome in _WITH_REWARD)
            demand(right, "a reward exactly with COMPLETED and TRUNCATED", f"{attempt.attempt_id}: {name}")
            for sequence in attempt.sequences:
                for segment in sequence.segments:
                    _segment(segment, attempt.attempt_id)


def _segment(segment: experience_pb2.Segment, where: str) -> None:
    sampled = segment.kind == experience_pb2.SEGMENT_KIND_SAMPLED
    count = len(segment.token_ids) if sampled else 0
    demand(segment.loss == sampled, "loss in SAMPLED segments alone", segment, where)
    demand(len(segment.log_probs) == count, f"{count} log-probabilities in the segment", segment, where)
    spans = sum(span.token_count for span in segment.policy_versions)
    demand(spans == count, f"version spans of {count} tokens", segment, where)


@suite.check("ListExperiences", "an experience is a tree of samples, which hold its parts and what was trained on")
async def samples(trainer: Trainer) -> None:
    run = await trained(trainer)
    for experience in await _experiences(trainer, run.run_id, 100):
        where = experience.experience_id
        ids = [sample.sample_id for sample in experience.samples]
        demand(bool(ids) and len(set(ids)) == len(ids), "samples, each id once", ids, where)
        for place, sample in enumerate(experience.samples):
            demand(bool(sample.role), "a role", sample.sample_id, where)
            before = ["", *ids[:place]]
            demand(sample.parent_id in before, f"a parent among {before}", sample.parent_id, where)
        made = {target.target_id: target.source_id for target in experience.targets}
        demand(set(made.values()) <= set(ids), "targets whose sources are samples", made, where)
        taught = {datum.source_id for datum in experience.trained}
        demand(taught <= {*ids, *made}, "trained data of its samples and targets", taught, where)
        by_role = {sample.role: sample for sample in experience.samples}
        first = by_role.get("first")
        demand(first is not None, "a sample of role first: this run is ERL's", list(by_role), where)
        assert first is not None
        same = (first.sample_id, first.reward) == (experience.first_attempt.attempt_id, experience.first_attempt.reward)
        demand(same, "in first_attempt the sample of role first", experience.first_attempt.attempt_id, where)
