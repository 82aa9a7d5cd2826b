"""The largest memory that a learner takes up, in a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.tiny_model import write_tiny_model

LARGE_VOCABULARY = 151_936  # of Qwen3
TOKENS = 1500
WHOLE_LOGITS = TOKENS * LARGE_VOCABULARY * 4
# Prints by how many bytes a step raises the largest memory that the process had so far.
STEP = """
import sys
from pathlib import Path
import torch
from mulligan.trainer.learner.allocator import return_freed_memory
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import LoraSettings
from tests.support.learning import sampled, server_settings, spec

def peak():  # (The rusage of a process begins with that of its parent.)
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

return_freed_memory()
tokens = int(sys.argv[2])
folder = Path(sys.argv[1])
learner = Learner("learner", spec(folder, LoraSettings(rank=1)), server_settings(folder, microbatch_tokens=tokens))
places = range(1, tokens + 1)
datum = sampled(tokens=[place % 1000 for place in range(tokens + 1)], trained=places, rollout=[-9.0] * tokens)
learner.forward_backward([sampled(tokens=datum.token_ids[:10], trained=(9,), rollout=(-9.0,))], ppo.Settings())
before = peak()
learner.forward_backward([datum], ppo.Settings(kl_coefficient=0.1, entropy_coefficient=0.1))
print(peak() - before)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_the_head_never_holds_all_tokens_times_a_large_vocabulary(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=LARGE_VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=TOKENS + 1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(write_tiny_model(tmp_path / "tiny") / name, tmp_path / name)
    arguments = [sys.executable, "-c", STEP, str(tmp_path), str(TOKENS)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 2 * WHOLE_LOGITS, "all at once take six times the logits"
