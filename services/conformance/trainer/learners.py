"""Checks of LearnerService: numbered calls exactly once, owners, and bad data. They leave nothing behind."""

from __future__ import annotations

import math
from typing import Any

from mulligan.conformance.report import Suite, demand
from mulligan.conformance.target import gathered
from mulligan.conformance.trainer.held import RemoteLearner, Trainer, datum
from mulligan.trainer.v1 import learner_service_pb2 as pb

suite: Suite[Trainer] = Suite()
_ALIKE = 1e-3  # relative: two learners of the same seed on one machine


@suite.check(
    "CreateLearner", "a new learner's calls are numbered from 1; a repeated CreateLearner returns the same answer"
)
async def created(trainer: Trainer) -> None:
    async with trainer.learner() as learner:
        first = learner.created
        demand(first.next_sequence == 1, "next_sequence 1", first, learner.request)
        sizes = 0 < first.trainable_parameter_count <= first.parameter_count
        demand(sizes, "parameters, and at most as many that are trained", first, learner.request)
        demand(bool(first.fingerprint), "a fingerprint", first, learner.request)
        again = await trainer.session.ask("CreateLearner", learner.request)
        demand(again == first, f"the same answer, {first}", again, learner.request)
        await trainer.session.ask("ForwardBackward", learner.backward(1))
        later = await trainer.session.ask("CreateLearner", learner.request)
        demand(later.next_sequence == 2, "where counting stands, next_sequence 2", later, learner.request)


@suite.check("CreateLearner", "other settings are ALREADY_EXISTS LEARNER_CONFLICT")
async def conflict(trainer: Trainer) -> None:
    async with trainer.learner() as learner:
        other = pb.CreateLearnerRequest()
        other.CopyFrom(learner.request)
        other.seed += 1
        await trainer.session.refused("CreateLearner", other, "ALREADY_EXISTS", "LEARNER_CONFLICT")


@suite.check("CreateLearner", "a bad field is INVALID_ARGUMENT INVALID_FIELD and named")
async def bad_settings(trainer: Trainer) -> None:
    for field, change in (
        ("learner_id", {"learner_id": "../escape"}),
        ("learner_id", {"learner_id": ""}),
        ("owner", {"owner": ""}),
        ("keep_checkpoints", {"keep_checkpoints": -1}),
        ("optimizer.learning_rate", {"optimizer": pb.OptimizerConfig(learning_rate=-1.0)}),
        ("optimizer.beta1", {"optimizer": pb.OptimizerConfig(beta1=1.0)}),
    ):
        await trainer.session.bad_field("CreateLearner", trainer.create_request(**change), field)
    for field, model in (
        ("model.dtype", pb.ModelConfig(source=trainer.options.model, dtype="float16")),
        ("model.lora.rank", pb.ModelConfig(source=trainer.options.model, lora=pb.LoraConfig(rank=0))),
    ):
        request = trainer.create_request()
        request.model.CopyFrom(model)
        await trainer.session.bad_field("CreateLearner", request, field)


@suite.check("GetLearner", "an unknown learner is NOT_FOUND UNKNOWN_LEARNER, and named; deleting one succeeds")
async def unknown(trainer: Trainer) -> None:
    ids: dict[str, Any] = {"learner_id": "conformance-no-such-learner", "owner": "conformance"}
    for method, request in (
        ("GetLearner", pb.GetLearnerRequest(learner_id=ids["learner_id"])),
        ("Forward", pb.ForwardRequest(data=[datum()], **ids)),
        ("ForwardBackward", pb.ForwardBackwardRequest(sequence=1, data=[datum()], **ids)),
        ("OptimStep", pb.OptimStepRequest(sequence=1, **ids)),
        ("SaveCheckpoint", pb.SaveCheckpointRequest(name="one", **ids)),
        ("LoadCheckpoint", pb.LoadCheckpointRequest(name="one", **ids)),
        ("PublishWeights", pb.PublishWeightsRequest(policy_version=1, **ids)),
    ):
        found = await trainer.session.refused(method, request, "NOT_FOUND", "UNKNOWN_LEARNER", "learner_id")
        named = found.metadata["learner_id"] == ids["learner_id"]
        demand(named, f"metadata `learner_id` is {ids['learner_id']}", found, request)
    await trainer.session.ask("DeleteLearner", pb.DeleteLearnerRequest(**ids))


@suite.check("GetLearner", "calls by another owner are FAILED_PRECONDITION LEARNER_OWNED")
async def owned(trainer: Trainer) -> None:
    async with trainer.learner() as learner:
        other = learner.ids | {"owner": "somebody-else"}
        for method, request in (
            ("CreateLearner", pb.CreateLearnerRequest(model=learner.request.model, **other)),
            ("Forward", pb.ForwardRequest(data=[datum()], **other)),
            ("ForwardBackward", learner.backward(1, owner="somebody-else")),
            ("OptimStep", learner.step(1, owner="somebody-else")),
            ("DeleteLearner", pb.DeleteLearnerRequest(**other)),
        ):
            found = await trainer.session.refused(method, request, "FAILED_PRECONDITION", "LEARNER_OWNED", "owner")
            demand(found.metadata["owner"] == learner.request.owner, "metadata `owner` is who holds it", found, request)
        await learner.log_probs()


@suite.check("Forward", "it returns a log-probability per trained token, the same when repeated, and changes nothing")
async def forward(trainer: Trainer) -> None:
    async with trainer.learner() as learner:
        request = learner.forward(datum("one"), datum("two", loss_mask=[False] * 5 + [True]))
        request.data[1].policy_gradient.rollout_log_probs[:] = [-3.0]
        first, again = [await trainer.session.ask("Forward", request) for _ in range(2)]
        counts = [len(row.log_probs) for row in first.log_probs]
        demand(counts == [3, 1], "3 and 1 log-probabilities, one per trained token", counts, request)
        values = [value for row in first.log_probs for value in row.log_probs]
        right = all(math.isfinite(value) and value <= 1e-4 for value in values)
        demand(right, "finite log-probabilities of at most 0", values, request)
        demand(first == again, "the same answer again", again, request)
        state = await learner.state()
        unchanged = (state.next_sequence, state.optimizer_steps, state.owner) == (1, 0, learner.request.owner)
        demand(unchanged, "next_sequence 1, no optimizer step, the owner who created it", state)


@suite.check("ForwardBackward", "a repeated call returns the stored answer, also one that comes at the same time")
async def repeated(trainer: Trainer) -> None:
    async with trainer.learner() as learner:
        answers = await gathered(trainer.session.ask("ForwardBackward", learner.backward(1)) for _ in range(4))
        answers.append(await trainer.session.ask("ForwardBackward", learner.backward(1)))
        demand(all(answer == answers[0] for answer in answers), f"{answers[0]}, each time", answers[-1])
        demand(answers[0].metrics["tokens"] == 3, "metric tokens of 3, the trained ones", answers[0])
        demand("first/loss" in answers[0].metrics and "loss" in answers[0].metrics, "loss, and first/loss", answers[0])
        following = (await learner.state()).next_sequence
        demand(following == 2, "next_sequence 2 after one call, however often it came", f"next_sequence {following}")


async def gradient(trainer: Trainer, times: int) -> tuple[float, RemoteLearner]:
    """The norm of the gradient after the first call was sent so many times."""
    async with trainer.learner() as learner:
        for _ in range(times):
            await trainer.session.ask("ForwardBackward", learner.backward(1))
        answers = [await trainer.session.ask("OptimStep", learner.step(2)) for _ in range(times)]
        same = all(answer == answers[0] for answer in answers)
        demand(same, "the stored answer when OptimStep is repeated", answers[-1], learner.step(2))
        return answers[0].metrics["grad_norm"], learner


@suite.check("ForwardBackward", "a repeated call never accumulates twice")
async def accumulates_once(trainer: Trainer) -> None:
    once, _ = await gradient(trainer, 1)
    thrice, learner = await gradient(trainer, 3)
    alike = math.isclose(once, thrice, rel_tol=_ALIKE)
    demand(alike, f"a gradient of norm {once:g}, however often the call came", f"{thrice:g}", learner.backward(1))


@suite.check("ForwardBackward", "any other sequence is FAILED_PRECONDITION SEQUENCE_MISMATCH, with next_sequence")
async def other_sequence(trainer: Trainer) -> None:
    async with trainer.learner() as learner:
        for sequence in (1, 2):
            await trainer.session.ask("ForwardBackward", learner.backward(sequence))
        others: list[tuple[str, Any]] = [
            ("ForwardBackward", learner.backward(1)),
            ("ForwardBackward", learner.backward(4)),
            ("ForwardBackward", learner.backward(2, datum("other", advantage=0.5))),
            ("OptimStep", learner.step(2)),
        ]
        for method, request in others:
            found = await trainer.session.refused(
                method, request, "FAILED_PRECONDITION", "SEQUENCE_MISMATCH", "next_sequence"
            )
            demand(found.metadata["next_sequence"] == "3", "metadata `next_sequence` is 3", found, request)
        await trainer.session.bad_field("OptimStep", learner.step(0), "sequence")


@suite.check("ForwardBackward", "bad data are INVALID_ARGUMENT INVALID_FIELD and named, and the sequence goes on")
async def bad_data(trainer: Trainer) -> None:
    bad = (
        datum("mask", loss_mask=[True] * 2),
        datum("nothing trained", loss_mask=[False] * 6),
        datum("first trained", loss_mask=[True] * 6),
        datum("token", token_ids=[2, 3, 4, 5, 6, 2**31 - 1]),
        datum("weight", weight=float("nan")),
        datum("temperature", temperature=0.0),
    )
    async with trainer.learner() as learner:
        for wrong in bad:
            request = learner.backward(1, datum(), wrong)
            await trainer.session.bad_field("ForwardBackward", request, "data[1]")
        aimless = datum("aimless")
        aimless.ClearField("policy_gradient")
        await trainer.session.bad_field("ForwardBackward", learner.backward(1, aimless), "data[0]")
        await trainer.session.ask("ForwardBackward", learner.backward(1))


@suite.check("OptimStep", "it takes one step and clears the gradient; without a gradient it takes none")
async def optim_step(trainer: Trainer) -> None:
    async with trainer.learner() as learner:
        before = await learner.log_probs()
        nothing = await trainer.session.ask("OptimStep", learner.step(1))
        demand(nothing.metrics["skipped"] == 1, "metric skipped of 1 with nothing accumulated", nothing)
        demand(await learner.log_probs() == before, "the weights as they were", "others", learner.step(1))
        await trainer.session.ask("ForwardBackward", learner.backward(2))
        taken = await trainer.session.ask("OptimStep", learner.step(3))
        demand(taken.metrics["skipped"] == 0, "metric skipped of 0 with a gradient", taken, learner.step(3))
        demand(taken.metrics["grad_norm"] > 0, "a grad_norm above 0", taken, learner.step(3))
        cleared = await trainer.session.ask("OptimStep", learner.step(4))
        demand(cleared.metrics["skipped"] == 1, "a cleared gradient after the step", cleared, learner.step(4))
        steps = (await learner.state()).optimizer_steps
        demand(steps == 1, "1 optimizer step taken", f"{steps}")


@suite.check("DeleteLearner", "deleting twice succeeds, and what was not saved is gone")
async def deleted(trainer: Trainer) -> None:
    async with trainer.learner() as learner:
        for _ in range(2):
            await trainer.session.ask("DeleteLearner", pb.DeleteLearnerRequest(**learner.ids))
        request = pb.GetLearnerRequest(learner_id=learner.request.learner_id)
        await trainer.session.refused("GetLearner", request, "NOT_FOUND", "UNKNOWN_LEARNER", "learner_id")
