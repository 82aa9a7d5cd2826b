"""`mulligan train --dry-run`. No service runs."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from typer.testing import CliRunner, Result

from mulligan.cli.app import app
from mulligan.cli.recipes import RECIPES
from mulligan.trainer.estimate.shapes import KNOWN

PAPER = ("frozenlake-paper",)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)


def dry_run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", *arguments, "--dry-run"])


def rows(output: str) -> Mapping[str, list[list[str]]]:
    """The cells of the tables by the first of their row."""
    found: dict[str, list[list[str]]] = {}
    for line in output.splitlines():
        first, *cells = re.split(r"\s{2,}", line.strip())
        found.setdefault(first, []).append(cells)
    return found


def test_full_training_of_the_papers_recipe() -> None:
    result = dry_run(*PAPER)
    assert result.exit_code == 0, result.output
    table = rows(result.stdout)
    assert "Qwen/Qwen3-4B-Instruct-2507: qwen3, 4.02 billion parameters (known shape)" in table
    # float32 weights, gradients, two moments, and the reference of the KL: 4 bytes each for 4,022,468,096 parameters
    assert table["weights"] == table["gradients"] == table["reference of the KL"] == [["15", "7.49", "1.87"]] * 2
    assert table["Adam's moments"] == [["30", "15", "3.75"]] * 2
    without, checkpointed = ([float(cell) for cell in row] for row in table["most at a time"])
    assert all(one > other > 0 for one, other in zip(without, checkpointed, strict=True))
    assert "gradient_checkpointing = true, 16,354 tokens at once" in result.stdout
    assert (
        "a step, at most: 1,024 trained sequences of up to 16,354 tokens, 16.7 million tokens in all" in result.stdout
    )
    assert "utilisation = 0.25" in result.stdout and "NVIDIA H100" in result.stdout
    minutes = [float(cell.removesuffix(" min")) for cell in table["a step with checkpointing"][0][1:]]
    assert minutes[0] == pytest.approx(8 * minutes[2], rel=0.01)
    hours = float(table["the run with checkpointing"][0][3].removesuffix(" h"))
    assert hours == pytest.approx(minutes[2] * 100 / 60, rel=0.01)


def test_lora_needs_less() -> None:
    table = rows(dry_run(*PAPER, "--set", "model.lora.rank=16").stdout)
    assert "trained: LoRA of rank 16, 33 million parameters; computed in bfloat16" in table
    assert table["weights"][0] == ["7.62", "3.81", "0.952"], "bfloat16, and float32 adapters"
    assert "reference of the KL" not in table, "it is the model without its adapter"


def test_a_checkpoint_is_as_large_as_its_moments_and_reference() -> None:
    """4,022,468,096 parameters, with 4 bytes of weights and two moments: in float32, or of 1 + 4 / 256 bytes."""

    def said(*changes: str) -> str:
        (found,) = re.findall(r"a checkpoint: (\S+) GiB", dry_run(*PAPER, *changes).stdout)
        return str(found)

    eight_bits = ("--set", "optimizer.moments=8bit")
    moving = ("--set", "loss.kl_coefficient=0.1", "--set", "loss.kl_reference=moving")
    assert [said(), said(*eight_bits), said(*moving), said(*eight_bits, *moving)] == ["45", "22.6", "59.9", "37.6"]


@pytest.mark.parametrize(
    ("targets", "trained"),
    [
        # a row of inputs and a column of outputs for each rank: 8 × (2560 + 4096), in 36 layers or in one
        ("['q_proj']", "1.92 million"),
        ("['q_proj','q_proj','self_attn.q_proj']", "1.92 million"),
        ("['layers.0.self_attn.q_proj']", "53,248"),
    ],
)
def test_adapters_are_counted_once_and_where_they_are(targets: str, trained: str) -> None:
    result = dry_run(*PAPER, "--set", "model.lora.rank=8", "--set", f"model.lora.target_modules={targets}")
    assert f"trained: LoRA of rank 8, {trained} parameters" in result.stdout, result.output


def test_assumptions_change_the_estimate() -> None:
    slow = dry_run(*PAPER, "--assume", "gpu=a100", "--assume", "turns=4", "--assume", "microbatch_tokens=20000").stdout
    assert "NVIDIA A100" in slow and "turns = 4 in an episode\n" in slow and "20,000 tokens at once" in slow


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*-paper*.toml")))
def test_recipes_of_the_paper_have_its_prompts(recipe: str) -> None:
    """As the comment of the recipe says."""
    (published,) = re.findall(r"limits are ([0-9,]+) tokens of prompt", (RECIPES / f"{recipe}.toml").read_text())
    environment = recipe.partition("-")[0]
    found = dry_run(recipe).stdout
    assert f"prompt_tokens = {published} of a sequence are not sampled, the published limit of {environment}" in found
    assert (
        "prompt_tokens = 77 of a sequence are not sampled\n" in dry_run(recipe, "--assume", "prompt_tokens=77").stdout
    )


def test_elsewhere_the_length_of_prompts_is_said_to_be_unknown() -> None:
    assert "prompt_tokens = 1,024 of a sequence are not sampled; not known here" in dry_run("frozenlake-3x3").stdout


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*-paper*.toml")))
@pytest.mark.parametrize("model", KNOWN)
def test_the_papers_models_need_no_download(recipe: str, model: str) -> None:
    result = dry_run(recipe, "--set", f"model.source={model}")
    assert result.exit_code == 0 and "known shape" in result.stdout, result.output


def test_a_method_that_is_not_counted_says_so() -> None:
    result = dry_run("frozenlake-3x3-ufo")
    assert result.exit_code == 0 and "Of ufo one episode in each rollout is counted" in result.stdout, result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--assume", "gpu=h10"], "--assume gpu: Input should be"),
        (["--assume", "gpuu=h100"], "--assume gpuu: no such setting; did you mean 'gpu'?"),
        (["--assume", "turns=0"], "--assume turns: Input should be greater"),
        (["--assume", "turns"], "--assume turns: expected NAME=VALUE"),
        (["--set", "model.source=Qwen/Qwen3-4C"], "give the folder that holds it: --set model.source=FOLDER"),
        (["--set", "model.source=smollm-135m"], "did you mean 'smollm2-135m'?"),
        (["--set", "model.lora={rank=4,target_modules=['q']}"], "model.lora.target_modules"),
        (["--set", "environment=acme.game"], "acme.game: how many turns an episode has is not known here"),
    ],
)
def test_what_is_not_known_is_refused_in_one_line(arguments: list[str], said: str) -> None:
    result = dry_run(*PAPER, *arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and said in result.stderr, result.output
    assert result.stdout == ""


def test_assumptions_without_a_dry_run_are_refused() -> None:
    result = CliRunner().invoke(app, ["train", "frozenlake-paper", "--assume", "turns=3"])
    assert result.exit_code == 2 and "--assume: expected together with --dry-run" in result.stderr
