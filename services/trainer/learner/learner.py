"""The learner: accumulates gradients, takes optimizer steps, saves, loads and publishes.

It is synchronous and not thread-safe: one worker thread runs it. The loss of a call is Σ_data weight · Σ_trained-tokens
loss. It is not normalised, so splitting data into calls and micro-batches does not change it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import PublishedWeights, WeightsKind
from mulligan.trainer.data import Datum, Distillation
from mulligan.trainer.learner import storage
from mulligan.trainer.learner.balance import passes
from mulligan.trainer.learner.batching import Microbatch, check, length, microbatch, packed
from mulligan.trainer.learner.metrics import Tally
from mulligan.trainer.learner.model import PolicyModel, arithmetic
from mulligan.trainer.learner.optimizer import create, split
from mulligan.trainer.learner.ranks import Ranks
from mulligan.trainer.learner.scoring import Scoring
from mulligan.trainer.learner.settings import LearnerServerSettings, LearnerSpec
from mulligan.trainer.learner.sharding import received, whole
from mulligan.trainer.learner.tensor_files import StoredTensors, TensorStream
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

    With several processes (`ranks`), each has a learner, and all call the same methods with the same arguments. Each
    runs its share of the data on its share of the weights (`balance`, `sharding`). Results are those of all data, in
    every process. The first process reads and writes the files.

    Another thread may read `progress`, which is (0, 0) between calls.

    Raises DomainError INVALID_FIELD, MODEL_NOT_FOUND, UNSUPPORTED_MODEL. After any other exception, from any method,
    gradients or weights are undefined and the learner must be deleted.
    """

    def __init__(self, learner_id: str, spec: LearnerSpec, server: LearnerServerSettings, ranks: Ranks | None = None):
        self.learner_id = storage.check_name("learner_id", learner_id)
        self.spec = spec
        self.server = server
        self.optimizer_steps = 0
        self._ranks = ranks or Ranks()
        self._skipped = 0  # optimizer steps in a row that were left out as not finite
        self._reference_step = -1  # when the moving reference last moved; -1: there is none
        self.progress = (0, 0)  # of the call with data that runs: its tokens that are done, all of them
        self._checkpoint = ""  # the one saved or loaded last
        self._published = -1  # the version published last
        self._device = self._ranks.device(server.device)
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)  # of the accumulated gradient
        if spec.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        with self._arithmetic():
            self.model = PolicyModel(
                spec.model,
                self._device,
                spec.seed,
                self._ranks,
                gradient_checkpointing=server.gradient_checkpointing,
                attention=server.attention,
            )
        self._parameters = list(self.model.trainable.values())
        self.fingerprint: str = self.model.fingerprint
        self.adapted_layers = self.model.adapted_layers
        self.parameter_count: int = self.model.parameter_count
        self.trainable_parameter_count: int = sum(parameter.numel() for parameter in self._parameters)
        with self._arithmetic():
            make = partial(create, self.model.trainable, spec.optimizer, self._device)
            self._optimizer = self._ranks.together(make)

    def _arithmetic(self) -> AbstractContextManager[None]:
        return arithmetic(deterministic=self.spec.deterministic, threads=self.server.threads)

    def forward(self, data: Sequence[Datum]) -> list[tuple[float, ...]]:
        """The log-probabilities of each datum's trained tokens under the present weights."""
        check(data, self.model.limits)
        counts = [sum(datum.loss_mask) for datum in data]
        found_N = torch.zeros(sum(counts))
        parts = found_N.split(counts)
        plain = [replace(datum, objective=Distillation(0.0)) for datum in data]  # without further sequences
        with self._counted(data), self._arithmetic(), torch.no_grad():
            for batch, counted in self._microbatches(plain, range(len(data)), [datum.branch for datum in data]):
                log_probs_N = self.model.whole_pass(partial(self._log_probs, batch))
                (own,) = batch.parts
                for row, log_probs in zip(own.rows, log_probs_N.split(list(own.own.counts)), strict=True):
                    if counted:
                        parts[row].copy_(log_probs)
        self._ranks.sum(found_N)
        return [tuple(part.tolist()) for part in parts]

    def _log_probs(self, batch: Microbatch) -> Tensor:
        (part,) = batch.parts
        hidden_PH = self.model.hidden(batch.trained)
        return self.model.score(hidden_PH[part.own.places_N], part.own)[0]

    def forward_backward(self, data: Sequence[Datum], loss: LossSettings) -> dict[str, float]:
        """Adds the gradient of the loss over `data`. Returns the metrics of the call.

        Data without gradient (weight 0, or inputs that cannot move the weights) only run forward, for their metrics.
        """
        check(data, self.model.limits)
        tally = Tally(sorted({datum.branch for datum in data}), self._device)
        self._move_reference(loss)
        moving = [row for row, datum in enumerate(data) if datum.weight and datum.objective.moves(loss)]
        still = sorted(set(range(len(data))) - set(moving))
        with self._counted(data), self._arithmetic():
            for rows, gradient in ((moving, True), (still, False)):
                for batch, counted in self._microbatches(data, rows, tally.branches):
                    with torch.set_grad_enabled(gradient):
                        total = self.model.whole_pass(partial(self._total, batch, loss, tally, counted=counted))
                    if gradient:
                        self._loss += total.detach()
                        total.backward()
            tally.add_up(self._ranks)
        return tally.metrics()

    def _microbatches(
        self, data: Sequence[Datum], rows: Sequence[int], branches: Sequence[str]
    ) -> Iterator[tuple[Microbatch, bool]]:
        """This process's micro-batches, each with whether it counts."""
        sharing = self.model.shares_prefixes
        groups, costs = packed(data, rows, self.server.microbatch_tokens, self._ranks.size, sharing=sharing)
        own = list(passes(costs, self._ranks.rank, self._ranks.size))
        spent, whole_cost = 0, sum(costs[place] for place, _ in own)
        done, total = self.progress
        for place, counted in own:
            yield microbatch(data, groups[place], branches, self._device, sharing=sharing), counted
            spent += costs[place]
            self.progress = (done + spent * sum(length(data[row]) for row in rows) // whole_cost, total)

    @contextmanager
    def _counted(self, data: Sequence[Datum]) -> Iterator[None]:
        """Around the micro-batches of a call, for its `progress`."""
        self.progress = (0, sum(map(length, data)))
        try:
            yield
        finally:
            self.progress = (0, 0)

    def _move_reference(self, loss: LossSettings) -> None:
        due = self._reference_step < 0 or self.optimizer_steps >= self._reference_step + loss.reference_every
        if loss.kl_reference is KlReference.MOVING and due:
            self.model.move_reference()
            self._reference_step = self.optimizer_steps

    def _total(self, batch: Microbatch, loss: LossSettings, tally: Tally, *, counted: bool) -> Tensor:
        """The loss of a micro-batch, summed; 0, with a gradient of 0, if it does not count."""
        scoring = Scoring(self.model, batch, loss, self._ranks)
        if counted:
            tally.count(batch.trained.sequence_tokens, batch.trained.computed_tokens)
        totals = []
        for part in batch.parts:
            terms = scoring.terms(part)
            loss_N, metrics = loss_of(part.kind)(terms, loss)
            weighted_N = part.weights_N * loss_N
            always = {"loss": weighted_N, "log_prob": terms.log_probs_N, "entropy": terms.entropy_N}
            if counted:
                tally.add(part.branches_N, {**metrics, **always})
            totals.append(weighted_N.sum())
        scoring.end()
        total = torch.stack(totals).sum()
        return total if counted else 0.0 * total

    def optim_step(self) -> dict[str, float]:
        """Clips the accumulated gradient to the global norm, takes a step, and clears the gradient.

        Metrics: `grad_norm` before clipping; `grad_clipped`, 1 if that was above `max_grad_norm`; `learning_rate`;
        `skipped`, 1 if the gradient is absent, or it or the loss is not finite, which changes neither weights nor
        optimizer; `not_finite`, 1 if it was skipped for the latter. Raises DomainError NOT_FINITE when
        `max_skipped_steps` steps in a row were not finite, and this one is not, either; it changes nothing.
        """
        settings = self.spec.optimizer
        warm = min(1.0, (self.optimizer_steps + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        rate = settings.learning_rate * warm
        with self._arithmetic():
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            norm_tensor = whole(torch.nn.utils.get_total_norm(gradients))
            norm = float(norm_tensor)
            finite = self._is_finite(norm)
            skipped = not gradients or not finite
            if not skipped:
                torch.nn.utils.clip_grads_with_norm_(self._parameters, settings.max_grad_norm, norm_tensor)
                self._optimizer.step(rate)
                self.optimizer_steps += 1
            self._clear_gradient()
        if gradients:
            self._skipped = 0 if finite else self._skipped + 1
        clipped = not skipped and norm > settings.max_grad_norm
        return {
            "grad_norm": norm,
            "grad_clipped": float(clipped),
            "learning_rate": rate,
            "skipped": float(skipped),
            "not_finite": float(bool(gradients) and not finite),
        }

    def _is_finite(self, norm: float) -> bool:
        loss = self._loss.clone()
        self._ranks.sum(loss)
        if math.isfinite(norm) and math.isfinite(loss):
            return True
        limit = self.spec.optimizer.max_skipped_steps
        if self._skipped >= limit:
            raise DomainError(
                Reason.NOT_FINITE,
                f"the gradient is not finite (norm {norm}, loss {float(loss)}). The {limit} optimizer steps before "
                "were skipped for the same reason (optimizer.max_skipped_steps). A lower learning rate may help",
            )
        return False

    def _clear_gradient(self) -> None:
        self._optimizer.clear_gradient()
        self._loss.zero_()

    def save_checkpoint(self, name: str, next_call: int = 1) -> SavedCheckpoint:
        """Writes weights, optimizer, random generator and the moving reference, but not accumulated gradients. All or
        nothing.

        `next_call` is stored for the server. Raises DomainError DISK_FULL.
        """
        folder = self._checkpoints / storage.check_name("name", name)
        parts = {
            "weights": self.model.trained_weights(),
            "optimizer": TensorStream(self._optimizer.stored()),
            "random": TensorStream(_random_state(self._device)),
        }
        if self._reference_step >= 0:
            parts["reference"] = TensorStream(self.model.moving_reference)
        state = storage.CheckpointState(
            self.fingerprint, next_call, self.optimizer_steps, self._reference_step, self.spec.optimizer.moments
        )

        def write() -> str:
            sha256 = storage.save_checkpoint(folder, parts, state)
            if self.spec.keep_checkpoints:
                # Until the caller has recorded the new checkpoint, it would go on from the one before: both stay.
                named = {name, self._checkpoint}
                storage.keep_checkpoints(self._checkpoints, max(2, self.spec.keep_checkpoints), named)
            return sha256

        sha256 = self._write(list(parts.values()), write)
        self._checkpoint = name
        return SavedCheckpoint(folder.resolve().as_uri(), sha256)

    def _write(self, streams: Sequence[TensorStream], write: Callable[[], str]) -> str:
        """The result of `write`, which writes the tensors of the streams, in their order, in the first process. The
        others take part in the gathering, also of what `write` leaves when it fails."""

        def gather() -> None:
            for stream in streams:
                stream.exhaust()

        def work() -> str:
            try:
                return write()
            finally:
                gather()

        return self._ranks.first(work, gather)

    def load_checkpoint(self, name: str) -> storage.CheckpointState:
        """Restores a checkpoint and clears accumulated gradients. An error changes nothing.

        Raises DomainError CHECKPOINT_NOT_FOUND, or CHECKPOINT_MISMATCH if it is damaged or of another model.
        """
        parts: dict[str, StoredTensors] = {}
        folder = self._checkpoints / storage.check_name("name", name)

        def read() -> dict[str, Any]:
            found, state = storage.load_checkpoint(folder)
            self._check_checkpoint(name, found, state)
            parts.update(found)
            return {"state": asdict(state), "parts": {part: tensors.described for part, tensors in found.items()}}

        told = self._ranks.first(read)
        described = told["parts"]

        def tensors(part: str, like: Callable[[str], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
            for key, (shape, dtype) in described.get(part, {}).items():
                tensor = parts[part][key] if parts else torch.empty(shape, dtype=getattr(torch, dtype))
                yield key, received(tensor, like(key), self._device, self._ranks)

        trainable = self.model.trainable
        with torch.no_grad():
            for key, tensor in tensors("weights", trainable.__getitem__):
                trainable[key].copy_(tensor)
        self._clear_gradient()
        self._skipped = 0
        self._optimizer.restore(tensors("optimizer", lambda key: trainable[split(key)[0]]))
        random = dict(tensors("random", lambda _: None))
        torch.set_rng_state(random["cpu"].cpu())
        if "cuda" in random and self._device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"].cpu(), self._device)
        self.model.moving_reference = dict(tensors("reference", trainable.__getitem__))
        state = storage.CheckpointState(**told["state"])
        self._reference_step = state.reference_step
        self.optimizer_steps = state.optimizer_steps
        self._checkpoint = name
        return state

    def _check_checkpoint(self, name: str, parts: dict[str, StoredTensors], state: storage.CheckpointState) -> None:
        if state.fingerprint != self.fingerprint:
            raise storage.damaged(name, "it belongs to another model")
        if {"weights", "optimizer", "random"} - set(parts) or "cpu" not in parts["random"]:
            raise storage.damaged(name, "parts are missing")
        expected = {key: list(parameter.shape) for key, parameter in self.model.trainable.items()}
        if parts["weights"].shapes != expected:
            raise storage.damaged(name, "other parameters were trained (full or LoRA, rank, target modules)")
        reference = parts["reference"].shapes if "reference" in parts else {}
        if reference != (expected if state.reference_step >= 0 else {}):
            raise storage.damaged(name, "the moving reference is of other parameters")
        if {split(key)[0] for key in parts["optimizer"]} - set(expected):
            raise storage.damaged(name, "the optimizer's state is of other parameters")
        if state.moments != self.spec.optimizer.moments:
            raise storage.damaged(name, f"it has moments of the kind {state.moments} (optimizer.moments)")

    def publish_weights(self, policy_version: int, keep: Collection[int] = ()) -> PublishedWeights:
        """Writes all weights, or the LoRA adapter, to the weights folder. Older versions are deleted, but not `keep`.

        With unchanged weights it writes the same file and probes again. Raises DomainError DISK_FULL.
        """
        stem = f"{self.learner_id}-v{policy_version:06d}"
        folder = self.server.weights_folder
        to_group = self.server.weights_access == "group"
        if self.model.adapter is None:
            kind = WeightsKind.FULL
            path = folder / f"{stem}.safetensors"
            weights = self.model.full_weights()
            sha256 = self._write([weights], partial(storage.publish_file, weights, path, to_group=to_group))
        else:
            kind = WeightsKind.LORA
            path = folder / stem
            save = partial(self.model.save_adapter, self.model.adapter_weights())
            names = ("adapter_config.json", "adapter_model.safetensors")
            sha256 = self._ranks.first(partial(storage.publish_folder, save, path, names, to_group=to_group))
        named = {policy_version, self._published, *keep}  # the policy may not have taken the newest yet
        self._ranks.first(partial(storage.keep_published, folder, self.learner_id, self.server.keep_weights, named))
        self._published = policy_version
        with self._arithmetic():
            probes = self.model.probes()
        return PublishedWeights(policy_version, kind, path.resolve().as_uri(), sha256, self.fingerprint, probes)

    @property
    def _checkpoints(self) -> Path:
        return self.server.checkpoint_folder / self.learner_id


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state
