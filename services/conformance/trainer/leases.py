"""Checks of leases: a learner that nobody calls is deleted. They take some seconds."""

from __future__ import annotations

import asyncio
import time

from google.protobuf.duration_pb2 import Duration

from mulligan.conformance.report import NotApplicable, Suite, Violation, demand
from mulligan.conformance.trainer.held import LEASE_SECONDS, RemoteLearner, Trainer
from mulligan.trainer.v1 import learner_service_pb2 as pb

suite: Suite[Trainer] = Suite()
# seconds
_SHORT = 1
_LONG = 4
_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 15


async def _listed(learner: RemoteLearner) -> pb.LearnerInfo | None:
    """The learner in the list, which renews no lease; None if it is gone."""
    answer = await learner.session.ask("ListLearners", pb.ListLearnersRequest())
    found = [info for info in answer.learners if info.learner_id == learner.request.learner_id]
    return found[0] if found else None


@suite.check("ListLearners", "a learner is listed with its owner, its model, and what is left of its lease")
async def listed(trainer: Trainer) -> None:
    async with trainer.learner() as learner:
        info = await _listed(learner)
        if info is None:
            raise Violation(f"{learner.request.learner_id} among the learners", "none of it", learner.request)
        demand(info.owner == learner.request.owner, f"owner {learner.request.owner!r}", info)
        demand(info.model.source == learner.request.model.source, "the model that it was created with", info)
        left = info.lease_left.seconds
        demand(0 < left <= LEASE_SECONDS, f"lease_left of at most {LEASE_SECONDS} s", info, learner.request)
        forever = trainer.create_request(learner_id=learner.request.learner_id)
        forever.ClearField("lease")
        await trainer.session.ask("CreateLearner", forever)
        info = await _listed(learner)
        own = info is not None and (not info.HasField("lease_left") or info.lease_left.ToNanoseconds() > 0)
        demand(own, "the server's own lease, or none", info, forever)
        await trainer.session.ask("DeleteLearner", pb.DeleteLearnerRequest(**learner.ids))
        demand(await _listed(learner) is None, "a deleted learner no more", "it")


@suite.check("CreateLearner", "a learner whose lease is over is deleted, and its place is free")
async def over(trainer: Trainer) -> None:
    async with trainer.learner(lease=Duration(seconds=_SHORT)) as learner:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while await _listed(learner) is not None:
            told = f"the learner {_PATIENCE_SECONDS} s later"
            demand(time.monotonic() < deadline, f"an end after the lease of {_SHORT} s", told, learner.request)
            await asyncio.sleep(_POLL_SECONDS)
        request = pb.GetLearnerRequest(learner_id=learner.request.learner_id)
        await trainer.session.refused("GetLearner", request, "NOT_FOUND", "UNKNOWN_LEARNER", "learner_id")
        again = await trainer.session.ask("CreateLearner", trainer.create_request(learner_id=request.learner_id))
        demand(again.next_sequence == 1, "a new learner, next_sequence 1", again)


@suite.check("GetLearner", "it renews the lease")
async def renewed(trainer: Trainer) -> None:
    async with trainer.learner(lease=Duration(seconds=_LONG)) as learner:
        request = pb.GetLearnerRequest(learner_id=learner.request.learner_id)
        begun = last = time.monotonic()
        while last < begun + 1.5 * _LONG:
            await asyncio.sleep(_POLL_SECONDS)
            answer = await trainer.session.attempt("GetLearner", request)
            now = time.monotonic()
            if now - last > _LONG / 2:
                raise NotApplicable(f"this machine is too busy to call within {_LONG / 2:g} s")
            last = now
            held = isinstance(answer, pb.GetLearnerResponse)
            demand(held, f"the learner, which was called within {_LONG} s each time", answer, request)


@suite.check("CreateLearner", "a lease that is not positive, or too long, is INVALID_ARGUMENT INVALID_FIELD")
async def bad_leases(trainer: Trainer) -> None:
    for seconds in (0, -1, 31 * 24 * 3600):
        request = trainer.create_request(lease=Duration(seconds=seconds))
        await trainer.session.bad_field("CreateLearner", request, "lease")
