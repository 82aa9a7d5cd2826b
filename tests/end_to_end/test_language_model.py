"""The services with a real pretrained language model: SmolLM2-135M-Instruct, of the Llama architecture, with 49,152
tokens, tied embeddings and a chat template that has a default system prompt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mulligan.cli.train import read_settings
from mulligan.common.channel import Endpoint
from mulligan.common.inference import CallOptions, Message, Role, SamplingParams
from mulligan.models.catalog import CATALOG, default_folder
from mulligan.models.fetch import is_there
from mulligan.policy.client import PolicyClient
from mulligan.testing.loop import Loop
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.journal import journal_file, read_experiences
from proof.language_model import ARMS, evaluate, learn
from tests.support.found import language_model
from tests.support.paths import IMPORT_ROOTS, ROOT

NAME = "smollm2-135m"
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
ONE_STEP = (
    *("steps=1", "rollout.tasks_per_step=1", "rollout.rollouts_per_task=2", "algorithm.optimizer_steps=1"),
    "evaluation.tasks=2",
)
pytestmark = pytest.mark.timeout(1800)  # 135 million parameters on a busy machine


@pytest.fixture(scope="module")
def model() -> Path:
    return language_model()


@pytest.fixture(scope="module")
def loop(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory, model: Path) -> Loop:
    folder = tmp_path_factory.mktemp("loop")
    return Loop.start(shared_services, folder, policy={"model": model, "models_folder": model.parent})


def mulligan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mulligan.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": IMPORT_ROOTS, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_was_fetched_is_whole_and_is_not_fetched_again(model: Path) -> None:
    if model != default_folder(NAME):
        pytest.skip(f"{model} was not fetched by `mulligan models fetch`")
    assert is_there(CATALOG[NAME], model)
    again = mulligan("models", "fetch", NAME)
    assert again.returncode == 0 and again.stdout.strip() == str(model), again.stderr
    assert "licence Apache-2.0" in again.stderr and "was there already, whole" in again.stderr
    assert str(model) in mulligan("models", "list").stdout


async def test_it_speaks_by_its_own_chat_template(loop: Loop) -> None:
    client = PolicyClient(Endpoint(loop.policy.address))
    messages = (Message(Role.SYSTEM, "You answer with one word."), Message(Role.USER, "What is the capital of France?"))
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    completion = await client.generate(messages, greedy, CallOptions(request_id="capital"))
    tokens = await client.tokenize(messages, CallOptions())
    by_default = await client.tokenize(messages[1:], CallOptions())
    said = await client.tokenize((Message(Role.SYSTEM, DEFAULT_SYSTEM), *messages[1:]), CallOptions())
    info = await client.info()
    await client.close()
    assert "Paris" in completion.text
    assert completion.prompt_token_ids == tokens and tokens[0] == 1  # <|im_start|>, and no other token before it
    assert by_default == said, "the template's own system prompt stands where no other is given"
    assert (info.vocabulary_size, info.context_length) == (49_152, 8_192)


@pytest.mark.long
@pytest.mark.parametrize("service", ["policy", "trainer"])
def test_policy_and_learner_conform(loop: Loop, model: Path, service: str) -> None:
    given = {"policy": ["--writes"], "trainer": ["--model", str(model)]}[service]
    target = getattr(loop, service).address
    done = mulligan("conformance", service, "--target", target, "--timeout", "600", "--json", *given)
    report: dict[str, Any] = json.loads(done.stdout)
    violated = [result for result in report["results"] if result["verdict"] == "violated"]
    assert done.returncode == 0 and not violated, (violated, done.stderr)
    assert report["counts"]["passed"] > 20


def test_a_demo_of_one_step_and_two_chains(model: Path, tmp_path: Path) -> None:
    """The short case of `python -m proof --only language-model`."""
    measured = learn("erl", 0, tmp_path, [f"model.source={model}", *ONE_STEP])
    assert (measured["arm"], measured["seed"], measured["steps"]) == ("erl", 0, 1)
    assert [point["step"] for point in measured["evaluations"]] == [0, 1]
    assert {len(measured[name]) for name in ("train_success", "second_success", "groups_with_signal")} == {1}
    run = tmp_path / "runs" / "demo-1"
    assert (run / "chart.png").read_bytes().startswith(b"\x89PNG")
    chains = read_experiences(journal_file(run / "journal", 0))
    assert len(chains) == 2
    for chain in chains:
        assert chain["first"].turns[0].observation.startswith("Write a sentence of at most 7 words with the word ")
        assert chain["first"].feedback and chain["first"].reward in (0.0, 1.0)


async def test_the_untrained_model_is_measured_as_the_runs_measure(loop: Loop, model: Path) -> None:
    settings = read_settings(Path(ARMS["erl"].recipe), ["seed=100", f"model.source={model}", *ONE_STEP])
    measured = await evaluate(Endpoint(loop.trainer.address), settings)
    assert (measured["attempts"], measured["excluded"], measured["max_tokens"]) == (2, 0, 20)
    assert measured["test_success"] in (0.0, 0.5, 1.0)
    assert measured["evaluation"]["temperature"] == 0.8 and measured["evaluation"]["tasks"] == 2
