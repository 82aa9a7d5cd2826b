"""How a real SGLang is launched on the CPU. MULLIGAN_TEST_SGLANG_PYTHON is the interpreter that has it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

LAUNCH_SECONDS = 600.0  # which a busy machine may take to start them
# What makes SGLang work, and rest while it has nothing to do, without a GPU. It computes on the last core; the rest is
# for everything else. Its own first call is left out: it ends a server that does not listen within 120 seconds, which a
# busy machine may take. The policy service waits for LAUNCH_SECONDS, and asks for itself.
CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--dtype", "float32", "--max-total-tokens", "65536"),
    *("--disable-overlap-schedule", "--disable-cuda-graph", "--sleep-on-idle", "--skip-server-warmup"),
)
CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": str((os.cpu_count() or 1) - 1),
    "HF_HUB_OFFLINE": "1",
}
LORA_FLAGS = (
    *("--enable-lora", "--max-lora-rank", "8", "--lora-backend", "torch_native"),
    *("--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj"),
)


def python_of_sglang() -> str:
    """Empty where there is none."""
    return os.environ.get("MULLIGAN_TEST_SGLANG_PYTHON", "")


def launch_settings(count: int = 1, flags: Sequence[str] = ()) -> dict[str, Any]:
    """The policy service's `sglang` settings. `flags` come after those that each server has, and win over them."""
    python = python_of_sglang()
    flags = (*CPU_FLAGS, *LORA_FLAGS, *flags)
    return {"launch": count, "python": python, "flags": flags, "environment": CPU_ENVIRONMENT}


def processes_of(address: str) -> list[int]:
    """Of a launched server: first the one that was started, which has this port among its arguments, then those that
    compute and decode for it."""
    port = address.rpartition(":")[2].encode()
    arguments = _arguments()
    named = [pid for pid, given in arguments.items() if b"sglang.launch_server" in given and port in given]
    leaders = [pid for pid in named if _group(pid) == pid]
    return leaders + [
        pid for pid, given in arguments.items() if given[0].startswith(b"sglang::") and _group(pid) in leaders
    ]


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _arguments() -> dict[int, list[bytes]]:
    """Of all processes."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().split(b"\0")
    return found


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0
