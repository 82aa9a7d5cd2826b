"""Runs many requests through one model, one forward pass at a time. Threads are the business of `engine.py`.

State is kept in arrays with one element per slot, so a pass takes Python the same time for one request as for a
hundred. A slot keeps its tokens after its request has finished. If a later prompt continues them, as the next turn of a
conversation does, only the new tokens are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import SamplingParams, StopReason, VersionSpan
from mulligan.policy.backend import Sampled
from mulligan.policy.backends.transformers import attention, sampling
from mulligan.policy.backends.transformers.constraints import Constraint

# A prefix that another slot holds is copied from this length on; computing fewer tokens is as fast.
_SHORTEST_COPY = 16
# The part of a completion in which a stop string is looked for, in tokens beyond the string's bytes.
_STOP_MARGIN = 16

Ints = npt.NDArray[np.int64]
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, attention.SlotAttention], torch.Tensor]


@dataclass(eq=False, slots=True)
class Request:
    """A prompt and how to sample after it. `slot` is set while it runs. The first `taken` tokens were already delivered
    in parts."""

    prompt: Sequence[int]
    sampling: SamplingParams
    seed: int
    constraint: Constraint | None = None
    slot: int = field(default=-1, init=False)
    taken: int = field(default=0, init=False)


class Runner:
    """At most `slots` requests at once. `forward` computes the logits of packed tokens: see `Model.forward`."""

    def __init__(
        self,
        forward: Forward,
        cache: attention.SlotCache,
        device: torch.device,
        end_of_turn: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        *,
        reuse_prefixes: bool,
        tokens_per_pass: int,
    ):
        slots = cache.slots
        capacity = cache.capacity
        self._forward = forward
        self._cache = cache
        self._device = device
        self._decode = decode
        self._end_of_turn = np.array(sorted(end_of_turn), dtype=np.int64)
        self._reuse_prefixes = reuse_prefixes
        self._tokens_per_pass = tokens_per_pass
        self.version = 0
        self._clock = 0
        self._requests: list[Request | None] = [None] * slots
        self._running = np.zeros(slots, dtype=bool)
        self._used = np.full(slots, -1, dtype=np.int64)  # when the slot's last request was admitted or finished
        self._tokens = np.zeros((slots, capacity), dtype=np.int32)  # prompt, then what was sampled
        self._log_probs = np.zeros((slots, capacity), dtype=np.float32)  # by position; of sampled tokens
        self._cached = np.zeros(slots, dtype=np.int64)  # tokens whose keys and values the cache holds
        self._written = np.zeros(slots, dtype=np.int64)  # tokens for which the cache has taken up memory
        self._held = np.zeros(slots, dtype=np.int64)  # the same, with those that a running request may still write
        self._known = np.zeros(slots, dtype=np.int64)  # tokens so far
        self._prompt = np.zeros(slots, dtype=np.int64)  # tokens of the prompt
        self._limit = np.zeros(slots, dtype=np.int64)  # tokens at which it ends
        self._temperature = np.zeros(slots, dtype=np.float32)
        self._top_p = np.zeros(slots, dtype=np.float32)
        self._top_k = np.zeros(slots, dtype=np.int64)
        self._stream = np.zeros(slots, dtype=np.uint64)
        self._has_stop = np.zeros(slots, dtype=bool)
        self._has_stop_token = np.zeros(slots, dtype=bool)
        self._constrained = np.zeros(slots, dtype=bool)

    @property
    def running(self) -> int:
        return int(self._running.sum())

    def has_room(self, request: Request) -> bool:
        """Whether a slot is free, and the cache can hold the request beside those that run. It can if none runs."""
        if self._running.all():
            return False
        return int(self._limit[self._running].sum()) + self._most_tokens(request) <= self._cache.room

    def _most_tokens(self, request: Request) -> int:
        return min(len(request.prompt) + request.sampling.max_tokens, self._cache.capacity)

    def admit(self, request: Request) -> None:
        """Gives the request a slot; it must have room. The prompt must be valid and shorter than the capacity."""
        params = request.sampling
        length = len(request.prompt)
        prompt = np.fromiter(request.prompt, dtype=np.int32, count=length)
        slot, cached = self._choose_slot(prompt)
        request.slot = slot
        self._requests[slot] = request
        self._running[slot] = True
        self._tokens[slot, :length] = prompt
        self._cached[slot] = cached
        self._known[slot] = self._prompt[slot] = length
        self._limit[slot] = self._most_tokens(request)
        self._temperature[slot] = params.temperature
        self._top_p[slot] = params.top_p
        self._top_k[slot] = params.top_k
        self._stream[slot] = sampling.stream(request.seed)
        self._has_stop[slot] = bool(params.stop)
        self._has_stop_token[slot] = bool(params.stop_token_ids)
        self._constrained[slot] = request.constraint is not None
        self._touch(slot)
        self._make_room(slot)

    def _make_room(self, slot: int) -> None:
        """Clears slots until the cache holds no more than it may: first the free ones, of which the least recently used
        comes first; then, of those that run, what earlier requests left behind the end of theirs."""
        self._held[slot] = max(self._written[slot], self._limit[slot])
        excess = int(self._held.sum()) - self._cache.room
        if excess <= 0:
            return
        kept = np.where(self._running, self._limit, 0)
        for other in np.lexsort((self._used, self._running)):
            if excess <= 0:
                return
            if self._held[other] > kept[other]:
                self._cache.clear(int(other), int(kept[other]))
                excess -= int(self._held[other] - kept[other])
                self._held[other] = kept[other]
                self._written[other] = min(self._written[other], kept[other])
                self._cached[other] = min(self._cached[other], kept[other])

    def cancel(self, request: Request) -> None:
        """Frees the request's slot. What it computed stays there for reuse."""
        if request.slot >= 0:
            self._free(request)

    def flush(self) -> None:
        """Clears the cache, after the weights changed. No request may be running."""
        self._cached[:] = 0
        self._used[:] = -1

    def step(self) -> list[tuple[Request, Sampled | DomainError]]:
        """One forward pass, with one new token for each request whose prompt is complete.

        Returns the finished requests, each with the tokens not yet taken in parts, and the failed ones.
        """
        slots_R = np.flatnonzero(self._running)
        pasts_R = self._cached[slots_R]
        counts_R = self._known[slots_R] - pasts_R
        if int(counts_R.sum()) > self._tokens_per_pass:
            counts_R = self._within_budget(slots_R, counts_R)
            taken_R = counts_R > 0
            slots_R = slots_R[taken_R]
            pasts_R = pasts_R[taken_R]
            counts_R = counts_R[taken_R]
        packed = attention.pack(slots_R, pasts_R, counts_R, self._cache.capacity)
        logits_RV = self._logits(packed)
        self._cached[packed.slots] += packed.counts
        complete_R = self._cached[packed.slots] == self._known[packed.slots]
        slots_S = packed.slots[complete_R]
        if len(slots_S) == 0:
            return []
        if not complete_R.all():
            logits_RV = logits_RV[torch.from_numpy(np.flatnonzero(complete_R)).to(self._device)]
        return self._extend(slots_S, logits_RV)

    def _logits(self, packed: attention.Packed) -> torch.Tensor:
        ids_N = self._tokens.reshape(-1)[packed.places].astype(np.int64)
        return self._forward(
            torch.from_numpy(ids_N).to(self._device),
            torch.from_numpy(packed.positions).to(self._device),
            torch.from_numpy(packed.last).to(self._device),
            attention.SlotAttention(self._cache, packed, self._device),
        )

    def _extend(self, slots_S: Ints, logits_SV: torch.Tensor) -> list[tuple[Request, Sampled | DomainError]]:
        """Samples one token for each of these slots."""
        known_S = self._known[slots_S]
        finished: list[tuple[Request, Sampled | DomainError]] = []
        allowed_SV = None
        if self._constrained[slots_S].any():
            allowed_SV = self._allowed(slots_S, logits_SV.shape[1], finished)
        uniform_S = sampling.uniforms(self._stream[slots_S], known_S - self._prompt[slots_S])
        tokens_S, log_probs_S = sampling.sample(
            logits_SV, self._temperature[slots_S], self._top_p[slots_S], self._top_k[slots_S], uniform_S, allowed_SV
        )
        self._tokens[slots_S, known_S] = tokens_S
        self._log_probs[slots_S, known_S] = log_probs_S
        self._known[slots_S] = known_S + 1
        ended_S = np.isin(tokens_S, self._end_of_turn)
        full_S = known_S + 1 >= self._limit[slots_S]
        watched_S = self._has_stop[slots_S] | self._has_stop_token[slots_S]
        if allowed_SV is not None:
            self._advance_constraints(slots_S, tokens_S)
        for index in np.flatnonzero((ended_S | full_S | watched_S) & self._running[slots_S]):
            slot = int(slots_S[index])
            reason = StopReason.END_OF_TURN if ended_S[index] else self._stop_reason(slot, int(tokens_S[index]))
            if reason is not None:
                finished.append(self._finish(slot, reason))
        return finished

    def _allowed(
        self, slots_S: Ints, size: int, failed: list[tuple[Request, Sampled | DomainError]]
    ) -> npt.NDArray[np.bool_]:
        """Allowed tokens, [S, V]. Requests that no token can continue are removed, and added to `failed`."""
        allowed_SV = np.ones((len(slots_S), size), dtype=bool)
        for index in np.flatnonzero(self._constrained[slots_S]):
            request = self._requests[slots_S[index]]
            assert request is not None
            assert request.constraint is not None
            allowed = request.constraint.allowed()
            if allowed is None:
                self._free(request)
                failed.append((request, _unfulfillable(request.constraint.problem)))
            else:
                allowed_SV[index] = allowed
        return allowed_SV

    def _advance_constraints(self, slots_S: Ints, tokens_S: Ints) -> None:
        for index in np.flatnonzero(self._constrained[slots_S] & self._running[slots_S]):
            request = self._requests[slots_S[index]]
            assert request is not None
            assert request.constraint is not None
            request.constraint.advance(int(tokens_S[index]))

    def _stop_reason(self, slot: int, token: int) -> StopReason | None:
        """Why the slot's request ends with this token, the last that it sampled; None if it goes on."""
        request = self._requests[slot]
        assert request is not None
        if token in request.sampling.stop_token_ids:
            return StopReason.STOP_TOKEN
        if self._has_stop[slot] and self._found_stop(slot):
            return StopReason.STOP_STRING
        if self._known[slot] < self._limit[slot]:
            return None
        sampled = int(self._known[slot] - self._prompt[slot])
        return StopReason.MAX_TOKENS if sampled >= request.sampling.max_tokens else StopReason.CONTEXT_FULL

    def take_part(self, request: Request) -> Sampled | None:
        """The tokens that a running request sampled since its last part; None if there are none."""
        slot = request.slot
        begin = int(self._prompt[slot]) + request.taken
        end = int(self._known[slot])
        if begin == end:
            return None
        request.taken += end - begin
        return self._sampled(slot, begin, end, None)

    def _finish(self, slot: int, reason: StopReason) -> tuple[Request, Sampled]:
        request = self._requests[slot]
        assert request is not None
        begin = int(self._prompt[slot]) + request.taken
        end = int(self._known[slot])
        self._free(request)
        return request, self._sampled(slot, begin, end, reason)

    def _sampled(self, slot: int, begin: int, end: int, reason: StopReason | None) -> Sampled:
        token_ids = tuple(self._tokens[slot, begin:end].tolist())
        log_probs = tuple(self._log_probs[slot, begin:end].tolist())
        return Sampled(token_ids, log_probs, reason, (VersionSpan(self.version, end - begin),))

    def _free(self, request: Request) -> None:
        slot = request.slot
        request.slot = -1
        self._held[slot] = self._written[slot] = max(self._written[slot], self._known[slot])
        self._requests[slot] = None
        self._running[slot] = False
        self._touch(slot)

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock

    def _choose_slot(self, prompt: npt.NDArray[np.int32]) -> tuple[int, int]:
        """A free slot, and how many tokens of the prompt it already holds: all but the last one at most, whose logits
        are needed.

        A conversation continues in its own slot. Any other prompt takes the least recently used slot. A prefix that it
        shares with another slot, such as a system prompt, is copied from there, since that conversation may go on.
        """
        length = len(prompt)
        if self._reuse_prefixes and (own := self._own_slot(prompt)) is not None:
            return own, min(int(self._cached[own]), length - 1)
        oldest = int(np.where(self._running, np.iinfo(np.int64).max, self._used).argmin())
        if not self._reuse_prefixes:
            return oldest, 0
        differs = self._tokens[:, :length] != prompt
        first_difference = np.where(differs.any(axis=1), differs.argmax(axis=1), length)
        shared = np.minimum(first_difference, self._cached)
        source = int(shared.argmax())
        count = min(int(shared[source]), length - 1)
        if source == oldest:
            return oldest, count
        if count < _SHORTEST_COPY:
            return oldest, 0
        self._cache.copy_prefix(source, oldest, count)
        return oldest, count

    def _own_slot(self, prompt: npt.NDArray[np.int32]) -> int | None:
        """The free slot that holds the longest beginning of the prompt: nothing else, and at least half of the
        prompt."""
        last = self._cached - 1
        fits = ~self._running & (last >= len(prompt) // 2) & (last < len(prompt))
        candidates = np.flatnonzero(fits)
        candidates = candidates[self._tokens[candidates, last[candidates]] == prompt[last[candidates]]]
        for slot in candidates[np.argsort(-last[candidates])]:
            count = self._cached[slot]
            if np.array_equal(self._tokens[slot, :count], prompt[:count]):
                return int(slot)
        return None

    def _within_budget(self, slots_R: Ints, counts_R: Ints) -> Ints:
        """How many tokens of each request this pass computes. Requests that sample come first, then the oldest
        prompts."""
        order = np.lexsort((self._used[slots_R], counts_R > 1))
        before = np.cumsum(counts_R[order]) - counts_R[order]
        allowed = np.empty_like(counts_R)
        allowed[order] = np.clip(self._tokens_per_pass - before, 0, counts_R[order])
        return allowed

    def _found_stop(self, slot: int) -> bool:
        request = self._requests[slot]
        assert request is not None
        longest = max(len(stop.encode()) for stop in request.sampling.stop)
        end = int(self._known[slot])
        begin = max(int(self._prompt[slot]), end - longest - _STOP_MARGIN)
        text = self._decode(self._tokens[slot, begin:end].tolist())
        return any(stop in text for stop in request.sampling.stop)


def _unfulfillable(problem: str) -> DomainError:
    return DomainError(Reason.UNSUPPORTED_OPTION, f"sampling: the completion can't be made to match: {problem}")
