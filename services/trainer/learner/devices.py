"""Whether this machine has the GPUs that the trainer's settings ask for."""

from __future__ import annotations

import torch

from mulligan.common.devices import TorchDevices, parse_device


def device_problem(device: str, processes: int, setting: str = "learner_processes") -> str:
    """Why so many processes of a learner cannot run on this machine with the setting `device`, and which setting is to
    be corrected; empty if they can. `setting` is what says how many processes there are."""
    seen = TorchDevices.seen_by(torch)
    if problem := seen.problem(device):
        return f"device: {problem}"
    if parse_device(device)[0] == "cuda" and (problem := seen.lacks_for(processes)):
        return f"{setting}: {problem}"
    return ""
