"""Checks of checkpoints and published weights, which stay on the trainer's disk."""

from __future__ import annotations

import re

from mulligan.conformance.report import Suite, demand
from mulligan.conformance.trainer.held import Trainer
from mulligan.trainer.v1 import learner_service_pb2 as pb

suite: Suite[Trainer] = Suite()
_ALIKE = 1e-5


@suite.check("LoadCheckpoint", "a checkpoint that is not there is NOT_FOUND CHECKPOINT_NOT_FOUND, and changes nothing")
async def unknown(trainer: Trainer) -> None:
    async with trainer.learner() as learner:
        request = pb.LoadCheckpointRequest(name="no-such-checkpoint", **learner.ids)
        found = await trainer.session.refused("LoadCheckpoint", request, "NOT_FOUND", "CHECKPOINT_NOT_FOUND", "name")
        demand(found.metadata["name"] == request.name, f"metadata `name` is {request.name}", found, request)
        await trainer.session.ask("ForwardBackward", learner.backward(1))


@suite.check("SaveCheckpoint", "a name that is no folder name is INVALID_ARGUMENT INVALID_FIELD")
async def bad_names(trainer: Trainer) -> None:
    async with trainer.learner() as learner:
        for name in ("", "../escape", ".hidden", "-f", "a/b"):
            save = pb.SaveCheckpointRequest(name=name, **learner.ids)
            await trainer.session.bad_field("SaveCheckpoint", save, "name")
            load = pb.LoadCheckpointRequest(name=name, **learner.ids)
            await trainer.session.bad_field("LoadCheckpoint", load, "name")


@suite.check("LoadCheckpoint", "it restores weights, optimizer steps and the sequence, and clears the gradient")
async def restored(trainer: Trainer) -> None:
    trainer.may_write()
    async with trainer.learner() as learner:
        await learner.learn(1)
        saved_at = await learner.log_probs()
        save = pb.SaveCheckpointRequest(name="one", **learner.ids)
        saved = await trainer.session.ask("SaveCheckpoint", save)
        right = bool(saved.uri) and re.fullmatch("[0-9a-f]{64}", saved.sha256) is not None
        demand(right, "a uri, and a SHA-256 in lower-case hexadecimal", saved, save)
        await learner.learn(3)
        await trainer.session.ask("ForwardBackward", learner.backward(5))
        load = pb.LoadCheckpointRequest(name="one", **learner.ids)
        loaded, again = [await trainer.session.ask("LoadCheckpoint", load) for _ in range(2)]
        demand(loaded == again, "the same answer again", again, load)
        stands = (loaded.next_sequence, loaded.optimizer_steps) == (3, 1)
        demand(stands, "next_sequence 3 and 1 optimizer step, as at the save", loaded, load)
        apart = max(abs(one - other) for one, other in zip(await learner.log_probs(), saved_at, strict=True))
        demand(apart <= _ALIKE, "the weights as at the save", f"log-probabilities {apart:g} apart", load)
        nothing = await trainer.session.ask("OptimStep", learner.step(3))
        demand(nothing.metrics["skipped"] == 1, "no gradient after loading", nothing, learner.step(3))


@suite.check("PublishWeights", "it returns the URI of the weights for UpdateWeights, and the same when repeated")
async def published(trainer: Trainer) -> None:
    trainer.may_write()
    async with trainer.learner() as learner:
        request = pb.PublishWeightsRequest(policy_version=1, **learner.ids)
        first, again = [await trainer.session.ask("PublishWeights", request) for _ in range(2)]
        demand(re.fullmatch("[0-9a-f]{64}", first.sha256) is not None, "a SHA-256", first, request)
        demand(first.uri.startswith("file://"), "a file:// URI", first, request)
        fingerprint = learner.created.fingerprint
        demand(first.fingerprint == fingerprint, f"the learner's fingerprint, {fingerprint}", first, request)
        for probe in first.canary:
            right = len(probe.log_probs) == len(probe.token_ids) - 1
            demand(right, "one log-probability per token after the first, in each canary", probe, request)
        demand((again.uri, again.sha256) == (first.uri, first.sha256), f"the same, {first}", again, request)
