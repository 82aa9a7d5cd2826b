"""Checks of objectives and losses that are chosen by name. They leave nothing behind."""

from __future__ import annotations

import math
from typing import Any

from mulligan.conformance.report import Suite, demand
from mulligan.conformance.trainer.held import Trainer, datum
from mulligan.trainer.v1 import learner_service_pb2 as pb

suite: Suite[Trainer] = Suite()
_ALIKE = 1e-3  # relative: two learners of the same seed on one machine


def coefficients(*values: float, name: str = "coefficients") -> pb.Datum:
    objective = pb.Objective(name="coefficients")
    objective.token_values[name].values.extend(values)
    return _with(custom=objective)


def _with(**objective: Any) -> pb.Datum:
    made = datum()
    made.MergeFrom(pb.Datum(**objective))
    return made


@suite.check("ForwardBackward", "what an objective or a loss does not have is INVALID_ARGUMENT INVALID_FIELD and named")
async def unknown(trainer: Trainer) -> None:
    async with trainer.learner() as learner:
        nameless = coefficients(1.0, 1.0, 1.0)
        nameless.custom.name = "no-such-objective"
        for wrong, field in (
            (nameless, "data[1].custom.name"),
            (coefficients(1.0, 1.0), 'data[1].custom.token_values["coefficients"]'),
            (coefficients(1.0, math.nan, 1.0), 'data[1].custom.token_values["coefficients"]'),
            (coefficients(1.0, 1.0, 1.0, name="coeficients"), 'data[1].custom.token_values["coeficients"]'),
            (_with(custom=pb.Objective(name="coefficients")), 'data[1].custom.token_values["coefficients"]'),
        ):
            await trainer.session.bad_field("ForwardBackward", learner.backward(1, datum(), wrong), field)
        loss = learner.backward(1)
        loss.loss.name = "no-such-loss"
        await trainer.session.bad_field("ForwardBackward", loss, "loss.name")
        setting = learner.backward(1)
        setting.loss.settings["no_such_setting"] = 1.0
        await trainer.session.bad_field("ForwardBackward", setting, "loss.no_such_setting")
        other = learner.backward(1)
        other.loss.name = "gspo"
        other.loss.dual_clip = 2.0
        await trainer.session.bad_field("ForwardBackward", other, "loss.dual_clip")
        await trainer.session.ask("ForwardBackward", learner.backward(1))


async def taken(trainer: Trainer, data: pb.Datum) -> tuple[float, float]:
    """Loss and norm of the gradient of one datum, at a new learner."""
    async with trainer.learner() as learner:
        answer = await trainer.session.ask("ForwardBackward", learner.backward(1, data))
        step = await trainer.session.ask("OptimStep", learner.step(2))
        return answer.metrics["loss"], step.metrics["grad_norm"]


async def same(trainer: Trainer, one: pb.Datum, other: pb.Datum) -> None:
    expected = await taken(trainer, one)
    found = await taken(trainer, other)
    alike = all(math.isclose(a, b, rel_tol=_ALIKE, abs_tol=1e-6) for a, b in zip(expected, found, strict=True))
    demand(alike, f"loss and norm of the gradient of {expected}, as of the first", found, f"{one}\nand\n{other}")


@suite.check("ForwardBackward", "coefficients of 1 are the same loss as supervised learning")
async def supervised(trainer: Trainer) -> None:
    await same(trainer, _with(distillation=pb.Distillation(target_weight=1.0)), coefficients(1.0, 1.0, 1.0))


@suite.check("ForwardBackward", "equal advantages of all tokens are the same loss as one advantage of the datum")
async def advantages(trainer: Trainer) -> None:
    each = datum(advantage=0.0)
    each.policy_gradient.advantages.extend([-0.5] * 3)
    await same(trainer, datum(advantage=-0.5), each)
    async with trainer.learner() as learner:
        both = datum(advantage=0.5)
        both.policy_gradient.advantages.extend([0.5] * 3)
        await trainer.session.bad_field(
            "ForwardBackward", learner.backward(1, both), "data[0].policy_gradient.advantage"
        )
