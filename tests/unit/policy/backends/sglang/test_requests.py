"""What is sent to SGLang and read from it. The JSON is of SGLang 0.5.23, shortened to what matters."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from mulligan import models
from mulligan.common.errors import DomainError, Reason
from mulligan.common.fingerprint import model_fingerprint
from mulligan.common.inference import SamplingParams, StopReason, VersionSpan, WeightsKind
from mulligan.common.model_files import UnsupportedModel
from mulligan.policy.backend import Ask, WeightsFile
from mulligan.policy.backends._servers.answers import Aborted, BadAnswer
from mulligan.policy.backends._servers.connection import RequestRefused
from mulligan.policy.backends._servers.folders import Folders, TargetWeights
from mulligan.policy.backends._servers.pool import ServerPool, place_of
from mulligan.policy.backends._servers.server import EngineServer
from mulligan.policy.backends._servers.skeleton import Skeleton
from mulligan.policy.backends.sglang import Settings as SglangSettings
from mulligan.policy.backends.sglang import requests
from tests.support.sglang import changed, full
from tests.support.tiny_model import write_tiny_model


def sent(**sampling: Any) -> dict[str, Any]:
    ask = Ask([5, 6, 7], SamplingParams(**sampling), priority=3)
    body = requests.encode(ask, "rid", "adapter", 20, (1,), stream=False, priority=True)
    found: dict[str, Any] = json.loads(body)
    return found


def answer(
    ids: list[int], spans: Sequence[tuple[str, int, int]] = (), label: str = "a", finish: dict[str, Any] | None = None
) -> requests.Answer:
    meta = {
        "finish_reason": finish,
        "weight_version": label,
        "weight_versions": [{"version": name, "start": start, "end": end} for name, start, end in spans],
        "output_token_logprobs": [[-float(token), token, None] for token in ids],
    }
    return requests.decode(json.dumps({"text": "", "output_ids": ids, "meta_info": meta}).encode())


LENGTH = {"type": "length", "length": 4}


def test_options_go_by_the_names_that_sglang_has() -> None:
    request = sent(temperature=0.5, top_p=0.9, top_k=4, max_tokens=5, stop=("x",), stop_token_ids=(9,), seed=-3)
    assert request["input_ids"] == [5, 6, 7] and request["priority"] == 3 and request["lora_path"] == "adapter"
    assert request["sampling_params"] == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "max_new_tokens": 5,
        "sampling_seed": -3,
        "stop": ["x"],
        "no_stop_trim": True,
        "stop_token_ids": [1, 9],
    }
    assert sent(max_tokens=100)["sampling_params"]["max_new_tokens"] == 17  # the context has no room for more
    assert sent()["sampling_params"]["top_k"] == -1


def test_top_k_1_is_sampled_at_its_temperature() -> None:
    """SGLang would leave the temperature out, if only because all requests beside it have top-k 1, too."""
    assert (
        sent(temperature=0.5, top_k=1)["sampling_params"] | {"top_k": -1, "top_p": 1e-6}
        == sent(temperature=0.5, top_k=1)["sampling_params"]
    )
    assert sent(temperature=0.0, top_k=1)["sampling_params"]["top_k"] == 1


def test_a_stream_of_parts_and_one_that_repeats_itself_read_alike() -> None:
    last = [("a", 0, 3)]
    parts = [answer([1]), answer([2]), answer([3], last, finish=LENGTH)]
    repeated = [answer([1]), answer([1, 2]), answer([1, 2, 3], last, finish=LENGTH)]
    for events, incremental in ((parts, True), (repeated, False)):
        reader = requests.SglangStream("a", incremental=incremental)
        news = [reader.read(event) for event in events]
        assert news == [([1], (-1.0,), [("a", 1)]), ([2], (-2.0,), [("a", 1)]), ([3], (-3.0,), [("a", 1)])]
        assert reader.token_ids == [1, 2, 3]


def test_tokens_are_kept_back_while_nobody_knows_whose_they_are() -> None:
    """An event tells what the server holds when it sends it, which may be newer than its token."""
    reader = requests.SglangStream("a", incremental=True)
    assert reader.read(answer([1])) is not None
    assert reader.read(answer([2], label="b")) is None
    assert reader.read(answer([3], label="b")) is None
    final = answer([4], [("a", 0, 2), ("b", 2, 4)], "b", LENGTH)
    assert reader.read(final) == ([2, 3, 4], (-2.0, -3.0, -4.0), [("a", 1), ("b", 2)])


def test_tokens_that_were_told_wrongly_are_noticed() -> None:
    reader = requests.SglangStream("a", incremental=True)
    reader.read(answer([1]))
    with pytest.raises(BadAnswer):
        reader.read(answer([2], [("b", 0, 2)], "b", LENGTH))


def test_why_it_ended() -> None:
    def reason(last: int, finish: dict[str, Any], **sampling: Any) -> StopReason:
        found = answer([7, last], [("a", 0, 2)], finish=finish)
        return requests.stop_reason(found, found.output_ids, SamplingParams(**sampling), (1,))

    assert reason(1, {"type": "stop", "matched": "e"}, stop=("e",)) is StopReason.END_OF_TURN
    assert reason(9, {"type": "stop", "matched": 9}, stop_token_ids=(9,)) is StopReason.STOP_TOKEN
    assert reason(8, {"type": "stop", "matched": "e"}, stop=("e",)) is StopReason.STOP_STRING
    assert reason(8, LENGTH, max_tokens=2) is StopReason.MAX_TOKENS
    assert reason(8, LENGTH, max_tokens=3) is StopReason.CONTEXT_FULL
    assert reason(1, LENGTH, max_tokens=2) is StopReason.END_OF_TURN, "the last token decides"
    assert reason(9, LENGTH, max_tokens=2, stop_token_ids=(9,)) is StopReason.STOP_TOKEN


def test_what_is_no_answer() -> None:
    with pytest.raises(Aborted, match="aborted: incident"):
        requests.check_finish(answer([1], [("a", 0, 1)], finish={"type": "abort", "message": "gone"}))
    with pytest.raises(BadAnswer, match="not numbers"):
        requests.check_finish(answer([1], [("a", 0, 1)], finish={"type": "stop", "matched": "NaN happened"}))
    with pytest.raises(BadAnswer):
        requests.decode(b"<html>")
    with pytest.raises(BadAnswer):
        answer([1, 2], [("a", 0, 1)]).labels(0, 2)  # some tokens are nobody's
    with pytest.raises(RequestRefused):
        requests.decode_event(b'{"error": {"message": "no"}}')
    nothing = json.dumps({"output_ids": [3], "meta_info": {"output_token_logprobs": [[None, 3, None]]}}).encode()
    with pytest.raises(BadAnswer):
        requests.log_probs(requests.decode(nothing))


def test_a_score_that_is_not_a_number_stays_one() -> None:
    meta = {"input_token_logprobs": [[None, 3, None], [-1.5, 4, None], [None, 5, None]]}
    found = requests.decode_score(requests.decode(json.dumps({"meta_info": meta}).encode()), 2)
    assert found[0] == -1.5 and math.isnan(found[1])
    with pytest.raises(BadAnswer):
        requests.decode_score(requests.decode(json.dumps({"meta_info": meta}).encode()), 4)


def _target(version: int, label: str, adapter: str = "") -> TargetWeights:
    kind = WeightsKind.LORA if adapter else WeightsKind.FULL
    return TargetWeights(WeightsFile(None, kind, version, ""), label, adapter=adapter)


def _pool(target: TargetWeights, folder: Path) -> ServerPool:
    folders = Folders(SglangSettings(), folder, Skeleton(str(models.EMBEDDED)), 0)
    return ServerPool([], target, _look, folders, probe_seconds=1, wait_seconds=0)


async def _look(server: EngineServer) -> None:
    raise AssertionError("nothing looks here")


def test_an_answer_is_as_new_as_what_was_served_when_it_was_asked_for(tmp_path: Path) -> None:
    original = _target(0, "0-original")
    first = _target(1, "1-a")
    second = _target(2, "2-b")
    pool = _pool(original, tmp_path)
    pool.know(first)
    spans = pool.spans(original, [("0-original", 2), ("1-a", 3)], own=True)
    assert spans == (VersionSpan(0, 2), VersionSpan(1, 3))  # it was under way
    for label in ("0-original", "1-somebody", "default"):
        with pytest.raises(BadAnswer):
            pool.spans(first, [(label, 1)], own=True)
    pool.know(second)
    pool.know(first)  # rolled back
    assert pool.spans(first, [("1-a", 1)], own=True) == (VersionSpan(1, 1),)
    with pytest.raises(BadAnswer):
        pool.spans(first, [("2-b", 1)], own=True)


def test_an_adapter_counts_over_the_weights_that_it_was_made_for(tmp_path: Path) -> None:
    original = _target(0, "0-original")
    tuned = _target(3, "0-original", "mulligan-3")
    pool = _pool(original, tmp_path)
    pool.know(tuned)
    assert pool.spans(tuned, [("0-original", 4)], own=True) == (VersionSpan(3, 4),)
    assert pool.spans(tuned, [("0-original", 4)], own=False) == (VersionSpan(0, 4),)  # a fixed adapter
    pool.know(_target(4, "4-c"))
    with pytest.raises(BadAnswer):
        pool.spans(tuned, [("0-original", 2), ("4-c", 2)], own=True)


def test_what_shares_a_prefix_shares_a_server() -> None:
    prompt = list(range(400))
    assert place_of("s", "", prompt) == place_of("s", "x", [1])
    assert place_of("", "", prompt) == place_of("", "", [*prompt[:300], 7])
    assert len({place_of("", "", prompt), place_of("", "a", prompt), place_of("", "", prompt[1:])}) == 3


def test_the_fingerprint_needs_no_weights(tmp_path: Path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny")
    for tie in (True, False):
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        config = LlamaConfig(vocab_size=32, tie_word_embeddings=tie, **sizes)
        folder = tmp_path / f"llama-{tie}"
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    for source in (models.EMBEDDED, tiny, tmp_path / "llama-True", tmp_path / "llama-False"):
        loaded = AutoModelForCausalLM.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        assert Skeleton(str(source)).fingerprint == model_fingerprint(loaded, tokenizer), source
    with pytest.raises(UnsupportedModel):
        Skeleton(str(tmp_path / "nothing"))


def test_weights_are_put_where_the_servers_see_them_and_removed(tmp_path: Path) -> None:
    skeleton = Skeleton(str(models.EMBEDDED))
    weights = full(tmp_path, changed(1), 1)
    settings = SglangSettings(folder=tmp_path / "shared", folder_in_engine="/mnt/weights")
    folders = Folders(settings, tmp_path / "unused", skeleton, 0)
    target = folders.prepare(weights)
    assert target.label == f"1-{weights.sha256[:12]}" and target.path.startswith("/mnt/weights/")
    here = tmp_path / "shared" / Path(target.path).relative_to("/mnt/weights")
    assert weights.path is not None
    assert (here / "model.safetensors").read_bytes() == weights.path.read_bytes()
    assert not (here / "model.safetensors").is_symlink()
    assert json.loads((here / "config.json").read_text())["model_type"] == "qwen3"
    folders.remove(target)
    assert not here.exists()
    weights.path.write_bytes(b"no safetensors")
    with pytest.raises(DomainError) as caught:
        folders.prepare(weights)
    assert caught.value.reason is Reason.MODEL_MISMATCH
    folders.close()
    assert not list((tmp_path / "shared").iterdir())
