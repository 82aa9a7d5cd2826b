"""A real vLLM behind the backend itself, on the CPU. There vLLM takes no heads of less than 32 numbers, so the model is
the embedded one with longer heads and random weights."""

from __future__ import annotations

import copy
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from mulligan.common.inference import WeightsKind
from mulligan.models import EMBEDDED
from mulligan.policy.backend import WeightsFile
from mulligan.policy.backends.vllm import Settings as VllmSettings
from mulligan.policy.backends.vllm import open as open_backend
from mulligan.policy.backends.vllm.backend import VllmBackend
from mulligan.testing.weights import load, sha256
from tests.support.found import require
from tests.support.settings import model_settings

CONTEXT_LENGTH = 512
START_SECONDS = 900  # on a machine that does something else, too
MODEL_NAME = "long-heads"
FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT_LENGTH), "--max-num-seqs", "32"),
    *("--enable-lora", "--max-lora-rank", "8", "--distributed-executor-backend", "uni"),
)
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",  # importing everything twice takes minutes
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def python_of_vllm() -> str:
    """Skips the test, or fails it, where there is none."""
    value = os.environ.get("MULLIGAN_TEST_VLLM_PYTHON", "")
    require(
        "" if value else "MULLIGAN_TEST_VLLM_PYTHON is not set: no vLLM to test with", "MULLIGAN_TEST_VLLM_REQUIRED"
    )
    return value


def write_model(folder: Path) -> Path:
    config = AutoConfig.from_pretrained(EMBEDDED)
    config.head_dim = 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder / name)
    return folder


@contextmanager
def running(model: Path, folder: Path) -> Iterator[str]:
    """The address of a server of this model, which is up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    arguments += ["--host", "127.0.0.1", "--enable-scale-out", "--logprobs-mode", "processed_logprobs", *FLAGS]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    log = folder / "vllm.log"
    with log.open("wb") as output:
        command = [python_of_vllm(), *arguments]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_open(port):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"vLLM did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@asynccontextmanager
async def opened(folder: Path, model: Path, vllm: VllmSettings, **settings: Any) -> AsyncIterator[VllmBackend]:
    plain = {"backend": "vllm", "model": str(model), "vllm": vllm}
    backend = await open_backend(model_settings(**(plain | settings)), folder / "engine", 0)
    assert isinstance(backend, VllmBackend)
    try:
        yield backend
    finally:
        await backend.close()


def changed(path: Path, seed: int, scale: float = 0.02) -> Any:
    """The model with other weights."""
    model = load(path)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def lora(path: Path, folder: Path, version: int, targets: Sequence[str], **settings: Any) -> tuple[Any, WeightsFile]:
    """The model with an adapter that changes it, and the adapter's files."""
    torch.manual_seed(version)
    plain: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(targets), "task_type": "CAUSAL_LM"}
    tuned = get_peft_model(copy.deepcopy(load(path)), LoraConfig(**(plain | settings)))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    target = folder / f"lora-{version}"
    tuned.save_pretrained(str(target))
    return tuned.eval(), WeightsFile(target, WeightsKind.LORA, version, sha256(target / "adapter_model.safetensors"))


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
