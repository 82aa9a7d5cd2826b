"""The models that are measured. None ever ends a turn, so that every request samples its full number of tokens."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mulligan import models
from mulligan.common.inference import PublishedWeights, WeightsKind
from mulligan.models.build import write_untrained
from mulligan.trainer.data import ModelLimits
from mulligan.trainer.learner import weight_check

_ENDS = ("eos_token", "eos_token_id", "chat_template")
_CHANGE = 1e-3  # standard deviation of what an update adds to each weight


def embedded(folder: Path) -> Path:
    """The embedded model, or its untrained shape if it does not exist yet."""
    if (models.EMBEDDED / "config.json").exists():
        return endless(models.EMBEDDED, folder)
    return endless(write_untrained(folder / "untrained"), folder)


def endless(source: Path, folder: Path) -> Path:
    """A copy of the model without a token that ends a turn, in its settings or in a chat template."""
    path = folder / "model"
    path.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":  # may be large
            (path / file.name).symlink_to(file.resolve())
        elif file.is_file() and file.suffix != ".jinja":
            shutil.copy(file, path)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = path / name
        if settings.exists():
            content = json.loads(settings.read_text())
            kept = {key: content[key] for key in content if key not in _ENDS}
            if name == "config.json":  # without a value, architectures have one of their own
                kept["eos_token_id"] = None
            settings.write_text(json.dumps(kept))
    return path


def random_model(
    folder: Path, config: Mapping[str, Any], device: str, dtype: torch.dtype, shard_size: str = "5GB"
) -> Path:
    """A model of this config.json with random weights, and a tokenizer in which every id is one word."""
    path = folder / "model"
    words = {f"w{index}": index for index in range(config["vocab_size"])}
    inner = Tokenizer(tokenizer_models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    context = int(config["max_position_embeddings"])
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="w0", pad_token="w1", model_max_length=context
    ).save_pretrained(path)
    shape = AutoConfig.for_model(**config, bos_token_id=None, eos_token_id=None, pad_token_id=1)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    model.save_pretrained(path, max_shard_size=shard_size)
    return path


class UpdateSeries:
    """Weights for a series of updates. Each adds a small random change."""

    def __init__(self, model: Path, folder: Path, fingerprint: str, dtype: torch.dtype, device: str):
        self._source = model
        self._folder = folder
        self._fingerprint = fingerprint
        self._dtype = dtype
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, use_safetensors=True)
        self._model = loaded.to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
        text = self._model.config.get_text_config()
        limits = ModelLimits(self._model.get_input_embeddings().num_embeddings, text.max_position_embeddings)
        self._probes = weight_check.probe_sequences(tokenizer, limits)
        self._version = 0

    @torch.no_grad()
    def following(self) -> PublishedWeights:
        """The next weights, published as by a trainer, with the probes of the weight check."""
        self._version += 1
        for parameter in self._model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=_CHANGE)
        path = self._folder / f"{self._version}.safetensors"
        save_file(self._tensors(), path, metadata={"format": "pt"})
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        probes = weight_check.probes(self._model, self._probes, self._dtype)
        uri = path.resolve().as_uri()
        return PublishedWeights(self._version, WeightsKind.FULL, uri, sha256, self._fingerprint, probes)

    def folder_of(self, weights: PublishedWeights) -> Path:
        """The same weights as a model folder, for SGLang's own update."""
        folder = self._folder / f"folder-{weights.policy_version}"
        folder.mkdir()
        shutil.copy(self._source / "config.json", folder)
        (folder / "model.safetensors").symlink_to((self._folder / f"{weights.policy_version}.safetensors").resolve())
        return folder

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The weights by name, tied ones once."""
        seen: dict[int, str] = {}
        return {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in self._model.state_dict(keep_vars=True).items()
            if seen.setdefault(id(tensor), name) == name
        }
