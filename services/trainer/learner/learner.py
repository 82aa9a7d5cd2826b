"""The learner: accumulates gradients, takes optimizer steps, saves, loads and publishes.

It is synchronous and not thread-safe: one worker thread runs it. The loss of a call is Σ_data weight · Σ_trained-tokens
loss. It is not normalised, so splitting data into calls and micro-batches does not change it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mulligan.common.inference import PublishedWeights, WeightsKind
from mulligan.trainer.data import Datum, Distillation
from mulligan.trainer.learner import storage
from mulligan.trainer.learner.batching import Microbatch, check, microbatch, pack
from mulligan.trainer.learner.metrics import Tally
from mulligan.trainer.learner.model import PolicyModel, arithmetic
from mulligan.trainer.learner.scoring import Scoring
from mulligan.trainer.learner.settings import LearnerServerSettings, LearnerSpec
from mulligan.trainer.loss_terms import KlReference
from mulligan.trainer.objectives import loss_of
from mulligan.trainer.settings import LossSettings


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    uri: str
    sha256: str


class Learner:
    """One model in training. `learner_id` names its folder of checkpoints and its published files.

    `forward_backward` checks the data and packs them into micro-batches. For each it runs the model (`scoring`) and
    computes the losses of its objectives (`mulligan.trainer.objectives`) and their gradient. A `Tally` sums metrics.
    `optim_step` clips the accumulated gradient and updates the weights. `publish_weights` writes the weights with the
    probes of the weight check. `storage` writes all files.

    Raises DomainError INVALID_FIELD, MODEL_NOT_FOUND, UNSUPPORTED_MODEL. After any other exception, from any method,
    gradients or weights are undefined and the learner must be deleted.
    """

    def __init__(self, learner_id: str, spec: LearnerSpec, server: LearnerServerSettings):
        self.learner_id = storage.check_name("learner_id", learner_id)
        self.spec = spec
        self.server = server
        self.optimizer_steps = 0
        self._reference_step = -1  # when the moving reference last moved; -1: there is none
        self._checkpoint = ""  # the one saved or loaded last
        self._published = -1  # the version published last
        self._device = torch.device(server.device)
        if spec.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        with self._arithmetic():
            self.model = PolicyModel(spec.model, self._device, spec.seed)
        self._parameters = list(self.model.trainable.values())
        self.fingerprint: str = self.model.fingerprint
        self.adapted_layers = self.model.adapted_layers
        self.parameter_count: int = self.model.parameter_count
        self.trainable_parameter_count: int = sum(parameter.numel() for parameter in self._parameters)
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=spec.optimizer.learning_rate,
            betas=(spec.optimizer.beta1, spec.optimizer.beta2),
            weight_decay=spec.optimizer.weight_decay,
            fused=True,
        )

    def _arithmetic(self) -> AbstractContextManager[None]:
        return arithmetic(deterministic=self.spec.deterministic, threads=self.server.threads)

    def forward(self, data: Sequence[Datum]) -> list[tuple[float, ...]]:
        """The log-probabilities of each datum's trained tokens under the present weights."""
        check(data, self.model.limits)
        results: list[tuple[float, ...]] = [()] * len(data)
        plain = [replace(datum, objective=Distillation(0.0)) for datum in data]  # without further sequences
        with self._arithmetic(), torch.no_grad():
            for batch in self._microbatches(plain, range(len(data)), [datum.branch for datum in data]):
                (part,) = batch.parts
                hidden_PH = self.model.hidden(batch.trained)
                log_probs_N, _ = self.model.score(hidden_PH[part.own.places_N], part.own)
                for row, found in zip(part.rows, log_probs_N.split(list(part.own.counts)), strict=True):
                    results[row] = tuple(found.tolist())
        return results

    def forward_backward(self, data: Sequence[Datum], loss: LossSettings) -> dict[str, float]:
        """Adds the gradient of the loss over `data`. Returns the metrics of the call.

        Data without gradient (weight 0, or inputs that cannot move the weights) only run forward, for their metrics.
        """
        check(data, self.model.limits)
        tally = Tally(sorted({datum.branch for datum in data}), self._device)
        self._move_reference(loss)
        moving = [row for row, datum in enumerate(data) if datum.weight and datum.objective.moves(loss)]
        still = sorted(set(range(len(data))) - set(moving))
        with self._arithmetic():
            for rows, gradient in ((moving, True), (still, False)):
                for batch in self._microbatches(data, rows, tally.branches):
                    with torch.set_grad_enabled(gradient):
                        total = self._loss(batch, loss, tally)
                    if gradient:
                        total.backward()
        return tally.metrics()

    def _microbatches(
        self, data: Sequence[Datum], rows: Sequence[int], branches: Sequence[str]
    ) -> Iterator[Microbatch]:
        sharing = self.model.shares_prefixes
        for group in pack(data, rows, self.server.microbatch_tokens, sharing=sharing):
            yield microbatch(data, group, branches, self._device, sharing=sharing)

    def _move_reference(self, loss: LossSettings) -> None:
        due = self._reference_step < 0 or self.optimizer_steps >= self._reference_step + loss.reference_every
        if loss.kl_reference is KlReference.MOVING and due:
            self.model.move_reference()
            self._reference_step = self.optimizer_steps

    def _loss(self, batch: Microbatch, loss: LossSettings, tally: Tally) -> Tensor:
        scoring = Scoring(self.model, batch, loss)
        tally.count(batch.trained.sequence_tokens, batch.trained.computed_tokens)
        totals = []
        for part in batch.parts:
            terms = scoring.terms(part)
            loss_N, metrics = loss_of(part.kind)(terms, loss)
            weighted_N = part.weights_N * loss_N
            always = {"loss": weighted_N, "log_prob": terms.log_probs_N, "entropy": terms.entropy_N}
            tally.add(part.branches_N, {**metrics, **always})
            totals.append(weighted_N.sum())
        return torch.stack(totals).sum()

    def optim_step(self) -> dict[str, float]:
        """Clips the accumulated gradient to the global norm, takes a step, and clears the gradient.

        Metrics: `grad_norm` before clipping; `grad_clipped`, 1 if that was above `max_grad_norm`; `learning_rate`;
        `skipped`, 1 if the gradient is absent or not finite, which changes neither weights nor optimizer.
        """
        settings = self.spec.optimizer
        warm = min(1.0, (self.optimizer_steps + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        rate = settings.learning_rate * warm
        with self._arithmetic():
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            norm_tensor = torch.nn.utils.get_total_norm(gradients)
            norm = float(norm_tensor)
            skipped = not gradients or not math.isfinite(norm)
            if not skipped:
                torch.nn.utils.clip_grads_with_norm_(self._parameters, settings.max_grad_norm, norm_tensor)
                self._optimizer.param_groups[0]["lr"] = rate
                self._optimizer.step()
                self.optimizer_steps += 1
            self._optimizer.zero_grad(set_to_none=True)
        clipped = not skipped and norm > settings.max_grad_norm
        return {
            "grad_norm": norm,
            "grad_clipped": float(clipped),
            "learning_rate": rate,
            "skipped": float(skipped),
        }

    def save_checkpoint(self, name: str, next_call: int = 1) -> SavedCheckpoint:
        """Writes weights, optimizer, random generator and the moving reference, but not accumulated gradients. All or
        nothing.

        `next_call` is stored for the server. Raises DomainError DISK_FULL.
        """
        folder = self._checkpoints / storage.check_name("name", name)
        optimizer = {
            f"{name}/{slot}": value.detach().cpu()
            for name, parameter in self.model.trainable.items()
            for slot, value in self._optimizer.state.get(parameter, {}).items()
        }
        parts = {"weights": self._weights(), "optimizer": optimizer, "random": _random_state(self._device)}
        if self._reference_step >= 0:
            parts["reference"] = {name: tensor.cpu() for name, tensor in self.model.moving_reference.items()}
        state = storage.CheckpointState(self.fingerprint, next_call, self.optimizer_steps, self._reference_step)
        sha256 = storage.save_checkpoint(folder, parts, state)
        if self.spec.keep_checkpoints:
            # Until the caller has recorded the new checkpoint, it would go on from the one before: both stay.
            named = {name, self._checkpoint}
            storage.keep_checkpoints(self._checkpoints, max(2, self.spec.keep_checkpoints), named)
        self._checkpoint = name
        return SavedCheckpoint(folder.resolve().as_uri(), sha256)

    def load_checkpoint(self, name: str) -> storage.CheckpointState:
        """Restores a checkpoint and clears accumulated gradients. An error changes nothing.

        Raises DomainError CHECKPOINT_NOT_FOUND, or CHECKPOINT_MISMATCH if it is damaged or of another model.
        """
        parts, state = storage.load_checkpoint(self._checkpoints / storage.check_name("name", name))
        self._check_checkpoint(name, parts, state)
        with torch.no_grad():
            for key, parameter in self.model.trainable.items():
                parameter.copy_(parts["weights"][key])
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.state.clear()
        for key, value in parts["optimizer"].items():
            owner, slot = key.rsplit("/", 1)
            self._optimizer.state[self.model.trainable[owner]][slot] = value.to(self._device)
        torch.set_rng_state(parts["random"]["cpu"])
        if "cuda" in parts["random"] and self._device.type == "cuda":
            torch.cuda.set_rng_state(parts["random"]["cuda"], self._device)
        self.model.moving_reference = {
            key: tensor.to(self._device) for key, tensor in parts.get("reference", {}).items()
        }
        self._reference_step = state.reference_step
        self.optimizer_steps = state.optimizer_steps
        self._checkpoint = name
        return state

    def _check_checkpoint(self, name: str, parts: dict[str, dict[str, Tensor]], state: storage.CheckpointState) -> None:
        if state.fingerprint != self.fingerprint:
            raise storage.damaged(name, "it belongs to another model")
        if {"weights", "optimizer", "random"} - set(parts) or "cpu" not in parts["random"]:
            raise storage.damaged(name, "parts are missing")
        expected = {key: parameter.shape for key, parameter in self.model.trainable.items()}
        if {key: tensor.shape for key, tensor in parts["weights"].items()} != expected:
            raise storage.damaged(name, "other parameters were trained (full or LoRA, rank, target modules)")
        reference = {key: tensor.shape for key, tensor in parts.get("reference", {}).items()}
        if reference != (expected if state.reference_step >= 0 else {}):
            raise storage.damaged(name, "the moving reference is of other parameters")
        if {key.rsplit("/", 1)[0] for key in parts["optimizer"]} - set(expected):
            raise storage.damaged(name, "the optimizer's state is of other parameters")

    def publish_weights(self, policy_version: int) -> PublishedWeights:
        """Writes all weights, or the LoRA adapter, to the weights folder. Older versions are deleted.

        With unchanged weights it writes the same file and probes again. Raises DomainError DISK_FULL.
        """
        stem = f"{self.learner_id}-v{policy_version:06d}"
        folder = self.server.weights_folder
        if self.model.adapter is None:
            kind = WeightsKind.FULL
            path = folder / f"{stem}.safetensors"
            sha256 = storage.publish_file(self.model.full_weights(), path)
        else:
            kind = WeightsKind.LORA
            path = folder / stem
            sha256 = storage.publish_folder(
                self.model.save_adapter, path, ("adapter_config.json", "adapter_model.safetensors")
            )
        named = {policy_version, self._published}  # the policy may not have taken the newest yet
        storage.keep_published(folder, self.learner_id, self.server.keep_weights, named)
        self._published = policy_version
        with self._arithmetic():
            probes = self.model.probes()
        return PublishedWeights(policy_version, kind, path.resolve().as_uri(), sha256, self.fingerprint, probes)

    @property
    def _checkpoints(self) -> Path:
        return self.server.checkpoint_folder / self.learner_id

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().cpu().contiguous() for name, parameter in self.model.trainable.items()}


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state
