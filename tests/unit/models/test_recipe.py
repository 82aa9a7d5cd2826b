from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mulligan.env.envs import DEFAULT_ENVIRONMENTS
from mulligan.env.envs.frozenlake.boards import LakeBoard
from mulligan.env.envs.frozenlake.environment import FrozenLakeEpisode
from mulligan.env.load import load_or_explain
from mulligan.models import EMBEDDED
from mulligan.models.build import LETTERS, MOVES, ROLES, build_model, build_tokenizer, write_untrained
from mulligan.models.recipe.boards import ALPHABET, FIXED, Ints, draw_assignments, draw_boards, show, tables
from mulligan.models.recipe.measure import FIXED_SYMBOLS, environment, legend
from mulligan.models.recipe.play import play_batch
from mulligan.models.recipe.reflections import (
    FailedAttempts,
    RememberedLegends,
    draw_attempts,
    draw_memory,
    reflection_batch,
    write_legends,
    write_trace,
)
from mulligan.models.recipe.report import readme
from mulligan.models.recipe.sampling import (
    SampledAttempt,
    reflection_text,
    turn_text,
)
from mulligan.models.recipe.tokens import Writer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


def words_of(tokenizer: PreTrainedTokenizerBase, ids: Iterable[Any]) -> list[str]:
    return [str(tokenizer.convert_ids_to_tokens(int(index))) for index in ids]


def start(board: Ints, letters: Ints) -> FrozenLakeEpisode:
    roles = show(*(np.array([value]) for value in board))[0]
    cells = "".join("ABCD"[role] for role in roles)
    lake = environment("".join(LETTERS[letter] for letter in letters))
    return FrozenLakeEpisode(LakeBoard((cells[:3], cells[3:6], cells[6:])), lake.settings)


@pytest.mark.parametrize(
    "text",
    [
        "A player\nB goal\nC hole\nD floor\nplay",
        "```Up```",
        "<prompt> A player\nB goal </prompt>",
        "blocked\nA B X\n√ C D",
        "Up (no effect)\ninvalid",
        "fell into hole\nreached goal\nstep limit\nnothing",
    ],
)
def test_known_words_survive_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not any(token.startswith("<0x") for token in words_of(tokenizer, tokenizer.encode(text)))


def test_every_text_has_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer.encode("wörld🌍")) == "wörld🌍"
    assert tokenizer.unk_token is None
    assert len(tokenizer.encode("```Up```")) == 1


@pytest.mark.parametrize("name", ["frozenlake-3x3", "sokoban-small"])
def test_an_environment_for_the_model_speaks_its_words(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    game = load_or_explain(name, DEFAULT_ENVIRONMENTS[name])
    prompts = game.info.prompts
    texts = [prompts.solver, prompts.reflection_system, prompts.memory_empty, prompts.try_again]
    for index in range(20):
        episode = game.start(f"test/{index:05d}")
        for turn in range(game.info.max_steps):
            result = episode.step(f"```{MOVES[(index + turn) % 4]}```")
            texts += [episode.observation, result.observation, result.action, result.feedback]
            if result.done:
                break
    tokens = {token for text in texts for token in words_of(tokenizer, tokenizer.encode(text))}
    assert not {token for token in tokens if token.startswith("<0x")}


def test_chat_template_only_appends(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "play"}, {"role": "user", "content": "A\tB\nD\tD"}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    messages += [{"role": "assistant", "content": "```Up```"}, {"role": "user", "content": "blocked\nA\tB\nD\tD"}]
    later = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert later[: len(asked)] == asked
    assert words_of(tokenizer, later)[len(asked) : len(asked) + 2] == ["```Up```", "<|end|>"]


def test_untrained_folder_loads_and_depends_on_its_seed(tmp_path: Path) -> None:
    folder = write_untrained(tmp_path / "model", seed=3)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert len(AutoTokenizer.from_pretrained(folder)) == loaded.config.vocab_size
    assert torch.equal(loaded.lm_head.weight, build_model(3).lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, build_model(4).lm_head.weight)


def test_assignments_are_uniform_but_for_the_fixed_one() -> None:
    letters = draw_assignments(np.random.default_rng(1), 240_000)
    codes = letters @ np.array([ALPHABET**3, ALPHABET**2, ALPHABET, 1])
    seen, counts = np.unique(codes, return_counts=True)
    assert len(seen) == 12 * 11 * 10 * 9 - 1
    assert not (letters == np.array(FIXED)).all(axis=1).any()
    expected = len(letters) / len(seen)
    assert ((counts - expected) ** 2 / expected).sum() / len(seen) == pytest.approx(1.0, abs=0.1)


def test_training_boards_are_solvable_and_never_test_boards() -> None:
    boards = {tuple(board) for board in tables().boards.tolist()}
    drawn = {tuple(board) for board in draw_boards(np.random.default_rng(0), 2000).tolist()}
    assert drawn <= boards
    lake = environment()
    for index in range(100):
        cells = "".join(lake.board(f"test/{index:05d}").rows)
        holes = sum(1 << cell for cell, letter in enumerate(cells) if letter == "C")
        assert (cells.index("A"), cells.index("B"), holes) not in boards


def test_optimal_moves_agree_with_the_environment() -> None:
    for player, goal, holes in draw_boards(np.random.default_rng(2), 300):
        episode = start(np.array([player, goal, holes]), np.array(FIXED))
        cells = episode.observation.replace("\t", "").split("\n")
        distance = LakeBoard(tuple(cells)).shortest_path()
        for move, name in enumerate(MOVES):
            result = start(np.array([player, goal, holes]), np.array(FIXED)).step(f"```{name}```")
            rows = tuple(result.observation.removeprefix("blocked\n").replace("\t", "").split("\n"))
            left = 0 if result.reward else LakeBoard(rows).shortest_path() if not result.done else None
            shorter = distance is not None and left is not None and left == distance - 1
            assert bool(tables().optimal[goal, holes, player, move]) == shorter


def test_play_is_rendered_as_the_environment_and_the_template_do(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = np.random.default_rng(3)
    tokens = play_batch(rng, 40, 8, legend_share=1.0, fresh_share=0.0).tokens
    told = 0
    for row in tokens:
        words = [word for word in words_of(tokenizer, row) if word != "<|pad|>"]
        letters = [word for word, role in pairwise(words) if role in ROLES]
        first = words.index("<|user|>") + 1
        roles = "".join(
            "ABCD"[letters.index(word)] for word in words[first : words.index("<|end|>", first)] if word != "\n"
        )
        lake = environment("".join(letters))
        episode = FrozenLakeEpisode(LakeBoard((roles[:3], roles[3:6], roles[6:])), lake.settings)
        system = f"{legend(''.join(letters))}\n{lake.info.prompts.action_reminder}"
        messages = [{"role": "system", "content": system}, {"role": "user", "content": episode.observation}]
        answers = [word for word in words if word.startswith("```")]
        for turn, answer in enumerate(answers):
            result = episode.step(answer)
            messages.append({"role": "assistant", "content": answer})
            if turn + 1 < len(answers):
                assert not result.done
                messages.append({"role": "user", "content": result.observation})
        rendered = tokenizer.apply_chat_template(messages, return_dict=False)
        assert words_of(tokenizer, rendered) == words
        told += 1
    assert told == 40


def test_plain_play_has_the_solver_prompt_and_no_preference(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = play_batch(np.random.default_rng(4), 30, 2, legend_share=0.0)
    prompts = environment().info.prompts
    openings = {
        tuple(tokenizer.encode(f"<|system|>{text}<|end|><|user|>")) for text in (prompts.solver, prompts.try_again)
    }
    assert {tuple(row[: row.tolist().index(tokenizer.encode("<|user|>")[0]) + 1]) for row in batch.tokens} == openings
    moves = batch.targets[batch.weights == 1.0]
    assert np.allclose(np.sort(moves, axis=1)[:, -4:], 0.25)
    assert len(batch.cells_at) == 0


def play_out(attempts: FailedAttempts, row: int) -> SampledAttempt:
    prompts = environment().info.prompts
    episode = start(attempts.boards[row], attempts.letters[row])
    trace = ""
    shown = episode.observation
    feedback = ""
    for move in attempts.moves[row, : attempts.steps[row]]:
        result = episode.step("?" if move < 0 else f"```{MOVES[move]}```")
        trace += turn_text(prompts, shown, result.action)
        shown = result.observation
        feedback = result.feedback
        assert result.reward == 0
    assert result.done
    return SampledAttempt(trace + shown, feedback, 0.0, int(attempts.steps[row]))


def test_traces_are_rendered_as_the_environment_does(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = np.random.default_rng(5)
    attempts = draw_attempts(rng, 60)
    memory = draw_memory(rng, attempts.letters)
    writer = Writer(60)
    write_trace(writer, attempts)
    writer.legend(memory.letters, memory.filled)
    writer.words("nothing", where=~memory.filled)
    writer.words("<|end|>")
    writer.learn_column(np.ones(60, dtype=np.float32))
    prompts = environment().info.prompts
    for row, tokens in enumerate(writer.batch().tokens):
        remembered = legend("".join(LETTERS[letter] for letter in memory.letters[row])) if memory.filled[row] else ""
        text = reflection_text(prompts, play_out(attempts, row), remembered) + "<|end|>"
        assert [token for token in tokens.tolist() if token != tokenizer.pad_token_id] == tokenizer.encode(text)


def test_legends_tell_what_the_trace_shows() -> None:
    rng = np.random.default_rng(6)
    attempts = draw_attempts(rng, 2000)
    nothing = RememberedLegends(attempts.letters, np.zeros(2000, dtype=np.bool_))
    legends, chances = write_legends(rng, attempts, nothing)
    assert np.allclose(chances.sum(axis=2), 1.0)
    right = legends == attempts.letters
    assert right[attempts.fell].all()
    assert right[attempts.moved][:, [0, 3]].all()
    assert 0.5 < right.all(axis=1).mean() < 1.0
    remembered, _ = write_legends(rng, attempts, RememberedLegends(attempts.letters, np.ones(2000, dtype=np.bool_)))
    assert (remembered == attempts.letters).all(axis=1).mean() > 0.99
    assert (np.sort(remembered, axis=1)[:, 1:] != np.sort(remembered, axis=1)[:, :-1]).all()


def test_no_legend_learned_or_remembered_is_the_fixed_one(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = np.random.default_rng(7)
    fixed = tokenizer.encode(legend(FIXED_SYMBOLS))
    for _ in range(20):
        batch = reflection_batch(rng, 200)
        learned = set(batch.at[:, 0].tolist())
        for row in learned:
            text = batch.tokens[row].tolist()
            assert not any(text[at : at + len(fixed)] == fixed for at in range(len(text)))


def test_the_folder_is_small_and_its_readme_tells_its_metrics() -> None:
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) <= 4 * 2**20
    assert (EMBEDDED / "README.md").read_text() == readme(json.loads((EMBEDDED / "metrics.json").read_text()))


def test_the_tokenizer_in_the_folder_is_the_built_one(tokenizer: PreTrainedTokenizerBase) -> None:
    stored = AutoTokenizer.from_pretrained(EMBEDDED)
    assert stored.get_vocab() == tokenizer.get_vocab()
    assert stored.chat_template == tokenizer.chat_template
