"""A causal language model of transformers, loaded and checked, with the few calls that the engine needs.

Shapes: N packed tokens, R requests, B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from mulligan import models
from mulligan.common.devices import TorchDevices
from mulligan.common.fingerprint import model_fingerprint
from mulligan.common.model_files import UnsupportedModel, check_loaded, check_model, context_length, layer_count, short
from mulligan.policy.backends.transformers import Settings, attention
from mulligan.policy.backends.transformers.decoder import Decoder
from mulligan.policy.huggingface.tokenizer import Tokenizer
from mulligan.policy.model_settings import ModelSettings

_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Largest difference between log-probabilities of this engine and of the model's own code: float32, and the others.
_TOLERANCE = {torch.float32: 2e-3}
_LOW_PRECISION_TOLERANCE = 0.25
# Scores are computed for batches of at most this many logits, or for one sequence.
_SCORE_LOGITS = 2**26
# Loading changes torch's default type for the whole process, and puts back what it found.
_LOADING = threading.Lock()


class Model:
    """Loading raises UnsupportedModel if this engine would not compute the model exactly as transformers does."""

    def __init__(self, settings: ModelSettings):
        chosen = settings.own_as(Settings)
        self.source = models.locate(settings.model, settings.revision)
        self._score_logits = 0 if chosen.deterministic else _SCORE_LOGITS
        self.device = _device(chosen.device)
        self._wanted_dtype = _dtype(chosen.dtype, self.device)
        check_model(self.source)
        self.tokenizer = Tokenizer.load(self.source)
        self.module = self.load_weights()
        try:
            self.module.to(self.device)
        except (RuntimeError, AssertionError) as error:  # what torch raises for a device that is not there, or is full
            raise UnsupportedModel(f"{self.source} cannot be put on the device {self.device}: {error}") from error
        self.dtype: torch.dtype = next(self.module.parameters()).dtype
        self.config = self.module.config.get_text_config()
        own = context_length(self.config)
        self.context_length = min(filter(None, (settings.context_length, own)), default=0)
        if self.context_length < 2:
            raise UnsupportedModel(f"{self.source} states no context length: set context_length")
        self.vocabulary_size = int(self.config.vocab_size)
        self._refuse_other_layers()
        self._decoder: Decoder | None = None
        self.layers = self._check()
        self.fingerprint = model_fingerprint(self.module, self.tokenizer.inner)

    def load_weights(self) -> Any:
        """The module with the weights that the model came with, on the CPU."""
        dtype = "auto" if self._wanted_dtype is None else self._wanted_dtype
        disable_progress_bar()  # a service's log is no place for it
        try:
            with _LOADING:
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    self.source,
                    dtype=dtype,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    use_safetensors=True,  # a pickle can run code
                )
        except Exception as error:  # a loader fails in many ways, which mean the same to callers
            raise UnsupportedModel(f"{self.source} cannot be loaded: {short(error)}") from error
        module, found = loaded
        check_loaded(self.source, found, layer_count(module.config.get_text_config()))
        return module.eval().requires_grad_(False)

    def close(self) -> None:
        """Frees the memory of the weights. Nothing may use them any longer."""
        self._decoder = None
        self.module.to("meta")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def forward(
        self, ids_N: torch.Tensor, positions_N: torch.Tensor, last_R: torch.Tensor, attend: attention.SlotAttention
    ) -> torch.Tensor:
        """Logits [R, V] at the given indices of the packed tokens."""
        if self._decoder is not None:
            return self._decoder(ids_N, positions_N, last_R, attend)
        with attention.attending(attend):
            output = self.module(
                input_ids=ids_N[None], position_ids=positions_N[None], use_cache=False, logits_to_keep=last_R
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def score(self, sequences: Sequence[Sequence[int]], temperature: float) -> Iterator[list[tuple[float, ...]]]:
        """Log-probabilities of each token after the first, for a few sequences at a time, in order."""
        begin = 0
        while begin < len(sequences):
            end = begin
            longest = 0
            while end < len(sequences):
                longest = max(longest, len(sequences[end]))
                if end > begin and (end + 1 - begin) * longest * self.vocabulary_size > self._score_logits:
                    break
                end += 1
            yield self._score_batch(sequences[begin:end], temperature)
            begin = end

    @torch.inference_mode()
    def _score_batch(self, sequences: Sequence[Sequence[int]], temperature: float) -> list[tuple[float, ...]]:
        ids_BT = attention.token_rows(sequences).to(self.device)
        positions_BT = torch.arange(ids_BT.shape[1], device=self.device).expand_as(ids_BT)
        with attention.attending(attention.DenseAttention()):
            logits_BTV = self.module(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
        rows = []
        for row, sequence in enumerate(sequences):
            log_probs_TV = torch.log_softmax(logits_BTV[row, : len(sequence) - 1].float() / temperature, dim=-1)
            picked_T = log_probs_TV.gather(1, ids_BT[row, 1 : len(sequence), None])[:, 0]
            rows.append(tuple(picked_T.tolist()))
        return rows

    def _refuse_other_layers(self) -> None:
        others = set(getattr(self.config, "layer_types", None) or ()) - _LAYER_TYPES
        if others:
            raise UnsupportedModel(
                f"{self.source} has layers of the kinds {sorted(others)}; only attention is supported"
            )

    def _check(self) -> dict[int, attention.LayerShape]:
        """Compares packed passes over a cache, with two requests in turn, to the model's own forward pass."""
        rng = np.random.default_rng(0)
        length = min(24, self.context_length)
        rows = rng.integers(0, self.vocabulary_size, (2, length))
        with torch.inference_mode():
            expected = self.module(input_ids=torch.from_numpy(rows).to(self.device), use_cache=False).logits
        try:
            self.module.set_attn_implementation(attention.NAME)
            dense = attention.DenseAttention()
            with attention.attending(dense), torch.inference_mode():
                self.module(input_ids=torch.from_numpy(rows[:1]).to(self.device), use_cache=False)
            self._check_layers(dense.layers)
            if Decoder.can_run(self.module):
                self._decoder = Decoder(self.module, dense.layers)
            found = self._packed_logits(rows, dense.layers)
        except (AttributeError, TypeError, ValueError) as error:
            raise UnsupportedModel(f"{self.source} does not run with another attention function: {error}") from error
        last = torch.log_softmax(expected[:, -1].float(), -1)
        difference = (torch.log_softmax(found.float(), -1) - last).abs().max().item()
        tolerance = _TOLERANCE.get(self.dtype, _LOW_PRECISION_TOLERANCE)
        if not difference <= tolerance:
            raise UnsupportedModel(
                f"{self.source} gives other log-probabilities here than in transformers, by up to {difference:.3g}"
            )
        return dense.layers

    def _check_layers(self, layers: dict[int, attention.LayerShape]) -> None:
        """Checks that every layer calls the attention function, and that the windows are those of the configuration,
        which 24 tokens would not show."""
        count = int(self.config.num_hidden_layers)
        if sorted(layers) != list(range(count)):
            raise UnsupportedModel(
                f"{self.source}: {count - len(layers)} of {count} layers have no attention of their own"
            )
        types = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        if not getattr(self.config, "use_sliding_window", True):
            window = None
        for index, layer in layers.items():
            limited = types[index] == "sliding_attention" if types else window is not None
            if layer.window != (window if limited else None):
                raise UnsupportedModel(
                    f"{self.source}: layer {index} attends to {layer.window} tokens, not to {window}"
                )

    def _packed_logits(self, rows: Any, layers: dict[int, attention.LayerShape]) -> torch.Tensor:
        """Logits [2, V] after both rows, computed in three passes of unlike lengths."""
        length = rows.shape[1]
        cache = attention.SlotCache(layers, 2, length, self.dtype, self.device)
        slots_R = np.array([0, 1])
        past_R = np.zeros(2, dtype=np.int64)
        for first, second in ((length // 2, 1), (length - length // 2 - 1, length - 2), (1, 1)):
            counts_R = np.array([first, second])
            taken = counts_R > 0
            packed = attention.pack(slots_R[taken], past_R[taken], counts_R[taken], length)
            ids = rows.reshape(-1)[packed.places]
            logits = self.forward(
                torch.from_numpy(ids).to(self.device),
                torch.from_numpy(packed.positions).to(self.device),
                torch.from_numpy(packed.last).to(self.device),
                attention.SlotAttention(cache, packed, self.device),
            )
            past_R += counts_R
        return logits


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if problem := TorchDevices.seen_by(torch).problem(name, others=True):
        raise UnsupportedModel(f"device: {problem}")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The torch dtype; None for the one that the model was saved in."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else None
    dtype: torch.dtype = getattr(torch, name)
    return dtype
