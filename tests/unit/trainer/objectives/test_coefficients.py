"""Coefficients express any loss of first order: here PPO's, whose derivatives a caller computes from Forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mulligan.trainer.data import Datum
from mulligan.trainer.objectives.coefficients import Coefficients
from tests.support.learning import PLAIN, make, sampled
from tests.support.tiny_model import write_tiny_model


def test_a_caller_computes_ppo(tmp_path: Path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny")
    own, ppo = make(tiny, tmp_path), make(tiny, tmp_path)
    now = own.forward([sampled()])[0]
    old = (now[0] - 0.1, now[1] + 0.5)
    advantage = -1.5
    datum = sampled(advantage=advantage, rollout=old, old=old)

    log_probs = torch.tensor(now, requires_grad=True)
    ratio = (log_probs - torch.tensor(old)).exp()
    torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28)).sum().backward()
    assert log_probs.grad is not None
    objective = Coefficients(tuple((-log_probs.grad).tolist()))
    mine = Datum("mine", datum.token_ids, datum.loss_mask, 1.0, 1.0, objective, "first")

    metrics = own.forward_backward([mine], PLAIN)
    ppo.forward_backward([datum], PLAIN)
    assert metrics["loss"] == pytest.approx(log_probs.grad.dot(torch.tensor(now)).item(), rel=1e-5)
    expected = ppo.optim_step()
    assert own.optim_step()["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert own.forward([datum])[0] == pytest.approx(ppo.forward([datum])[0], abs=1e-5)


def test_without_coefficients_nothing_moves() -> None:
    assert not Coefficients((0.0, 0.0)).moves(PLAIN) and Coefficients((0.0, -0.1)).moves(PLAIN)
