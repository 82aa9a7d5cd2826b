"""The output head in one kernel: liger-kernel's fused linear cross-entropy, with the extra `liger`.

It gives the negative log-probability and the entropy of each token, and takes a gradient of each, so it fits all
losses. It is used where it is more than pieces of logits in torch, which `model` computes itself: on Hopper GPUs
(H100, H200), in bfloat16, for a head that is one linear layer without bias or cap. It adds up the gradient of the
head's weights in bfloat16, and computes it also where LoRA does not need it.
https://github.com/linkedin/Liger-Kernel: `ops/fused_linear_scaled_cross_entropy.py`
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def usable(head: Any, cap: float | None, device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) == (9, 0)
        and torch.is_autocast_enabled("cuda")
        and torch.get_autocast_dtype("cuda") == torch.bfloat16
        and not torch.are_deterministic_algorithms_enabled()
        and type(head) is torch.nn.Linear
        and head.bias is None
        and cap is None
        and _is_installed()
    )


@cache
def _is_installed() -> bool:
    try:
        import liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90  # noqa: F401 - needs NVIDIA's CUTLASS, too
    except ImportError:
        return False
    return True


def score(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, temperatures_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets, and entropies, both _N, under softmax(logits / temperature).

    The kernel takes one temperature, so it runs once for each that there is.
    """
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    places, log_probs, entropies = [], [], []
    for temperature in temperatures_N.unique().tolist():
        chosen = (temperatures_N == temperature).nonzero()[:, 0]
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden_NH[chosen], weight_VH, targets_N[chosen], temperature, return_entropy=True
        )
        places.append(chosen)
        log_probs.append(-nll)
        entropies.append(entropy.float())
    order = torch.cat(places).argsort()
    return torch.cat(log_probs)[order], torch.cat(entropies)[order]
