"""One server: what it can do, which weights it holds, and how to change them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, ClassVar

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Feature, LoraLimits, ReplicaInfo
from mulligan.common.tasks import gather_or_cancel
from mulligan.policy.backend import Scored
from mulligan.policy.backends._servers.answers import Aborted, BadAnswer
from mulligan.policy.backends._servers.connection import HttpConnection, RequestRefused, Unreachable
from mulligan.policy.backends._servers.folders import (
    GUEST_PREFIX,
    ORIGINAL,
    OWN_PREFIX,
    TargetWeights,
    known_as,
)
from mulligan.policy.backends._servers.skeleton import Skeleton

_UNCHECKED = "-unchecked"  # ends the label of a server that may not be asked yet


class Unsuitable(Exception):
    """A server that must not serve this policy; the message says why."""


class EngineServer(ABC):
    """A `Replica`. `fixed` are the adapters that it holds besides the weights: for each of its names, the folder.
    For a `guest` another policy sets the weights, and only adapters are loaded.

    Subclasses know how an engine is launched, what it can do, and how to call it. Methods raise Unreachable and
    RequestRefused unless they say otherwise. `ServerPool` calls those that change what it holds, one at a time.
    """

    connection_type: ClassVar[type[HttpConnection]]
    ready_path: ClassVar[str]  # answers when a launched server is ready
    launch_environment: ClassVar[Mapping[str, str]] = {}  # over the service's own
    takes_key_file: ClassVar[bool] = (
        False  # whether it reads keys from a file, which the list of processes does not show
    )
    lora_needs: ClassVar[str]  # what it is to be started with to take LoRA adapters
    load_adapter_path: ClassVar[str]
    unload_adapter_path: ClassVar[str]

    def __init__(
        self, connection: HttpConnection, request_seconds: float, fixed: Mapping[str, str], *, guest: bool = False
    ):
        self.connection = connection
        self.guest = guest
        self._seconds = request_seconds
        self._fixed = fixed
        self.serving = False
        self.problem = "not asked yet"
        self.times_let_in = 0
        self.in_flight = 0
        self.held: TargetWeights | None = None  # None: unknown
        self.label = ""  # the name that its answers must give for its weights
        self.path = ""  # of the folder that it loaded last
        self.own_path = ""  # of the model that it was started with
        self.settings: Mapping[str, Any] = {}
        self._adapters: set[str] = set()

    @property
    def engine(self) -> str:
        """What messages call it."""
        return self.connection.engine

    @property
    def address(self) -> str:
        return self.connection.address

    @property
    def info(self) -> ReplicaInfo:
        return ReplicaInfo(self.address, self.serving, self.in_flight, "" if self.serving else self.problem)

    # What it is

    @staticmethod
    def load_format(flags: Sequence[str]) -> list[str]:
        """A pickle can run code, so an engine loads safetensors alone, unless the flags name another format."""
        named = any(flag.partition("=")[0].replace("_", "-") == "--load-format" for flag in flags)
        return [] if named else ["--load-format", "safetensors"]

    @staticmethod
    @abstractmethod
    def launch_arguments(
        source: str, label: str, port: int, flags: Sequence[str], key_file: Path | None = None
    ) -> list[str]:
        """Of the interpreter, to serve the model `source` at this port. `label` names the weights that it starts with,
        if the engine takes a name then; `flags` are those of the settings. `key_file`, for one that `takes_key_file`,
        is a YAML file with the options `api-key` and, where there is one, `admin-api-key`."""

    @property
    @abstractmethod
    def context_length(self) -> int: ...

    @property
    @abstractmethod
    def features(self) -> frozenset[Feature]: ...

    @property
    @abstractmethod
    def deterministic(self) -> bool: ...

    @property
    @abstractmethod
    def lora(self) -> LoraLimits: ...

    @abstractmethod
    def dtype(self, skeleton: Skeleton) -> str:
        """The name that torch has for it."""

    @abstractmethod
    async def look(self, skeleton: Skeleton) -> None:
        """Reads what the server can do. Also raises Unsuitable."""

    @abstractmethod
    async def probe(self) -> None:
        """Also raises Unsuitable, if somebody else has changed its weights."""

    @abstractmethod
    async def repeats(self) -> bool:
        """Whether the server honours seeds."""

    # What it holds

    @abstractmethod
    async def pause(self) -> None:
        """Running requests wait, and later go on with the weights that are there then. Their cache is computed anew."""

    @abstractmethod
    async def go_on(self) -> None: ...

    def known_as(self, label: str) -> str:
        return known_as(label, guest=self.guest)

    async def load_weights(self, target: TargetWeights, *, checked: bool = True) -> None:
        """Has it hold the base weights of the target, whatever it holds now. A guest only looks at them, and raises
        Unsuitable if they are not what the model came with."""
        self.held = None
        if not self.guest:
            await self.pause()
            await self.load_base(target, checked=checked)
            await self.go_on()
            return
        self.label = await self._told_label()
        self.path = self.own_path
        if self.known_as(self.label) != ORIGINAL:
            raise Unsuitable(
                f"it holds weights {self.label!r} of the policy that sets them, and adapters_only needs those that the "
                "model came with"
            )

    async def load_base(self, target: TargetWeights, *, checked: bool = True) -> None:
        """Loads the base weights; the server must be paused. Without `checked` its answers have a label that nobody
        accepts."""
        label = target.label if checked else target.label + _UNCHECKED
        self.held = None
        await self._load(target.path or self.own_path, label)
        self.label = label
        self.path = target.path or self.own_path

    async def was_launched(self, label: str) -> None:
        """Notes that the server was started with what its model came with, under this label."""
        self.label = label
        self.path = self.own_path

    async def load_adapters(self, target: TargetWeights) -> None:
        """Loads the adapter of this target, and the fixed ones."""
        wanted = dict(self._fixed)
        if target.adapter:
            wanted[target.adapter] = target.adapter_path
        for name, path in wanted.items():
            if name not in self._adapters:
                body = {"lora_name": name, "lora_path": path}
                await self.connection.control(self.load_adapter_path, body, timeout=self._seconds)
                self._adapters.add(name)

    async def unload_others(self, *targets: TargetWeights) -> None:
        await self._unload_but({target.adapter for target in targets} | set(self._fixed))

    async def leave(self) -> None:
        """Unloads all adapters of the policy."""
        await self._unload_but(set())

    async def _unload_but(self, wanted: Set[str]) -> None:
        for name in sorted(self._adapters - wanted):
            if name.startswith(GUEST_PREFIX if self.guest else OWN_PREFIX):
                await self.unload(name)

    async def unload(self, name: str) -> None:
        """Unloads the adapter of this name, which no request uses any longer. One that is not loaded is ignored."""
        if name in self._adapters:
            self._adapters.discard(name)
            await self.connection.control(self.unload_adapter_path, {"lora_name": name}, timeout=self._seconds)

    async def accept(self) -> None:
        """Gives the weights their proper label, after they were checked."""
        if self.label.endswith(_UNCHECKED) and not self.guest:
            label = self.label.removesuffix(_UNCHECKED)
            await self._rename(label)
            self.label = label

    @abstractmethod
    async def release_memory(self) -> None: ...

    @abstractmethod
    async def resume_memory(self) -> None: ...

    @abstractmethod
    async def score_one(
        self, ids: Sequence[int], begin: int, temperature: float, adapter: str
    ) -> tuple[set[str], tuple[float, ...]]:
        """The labels of the weights that computed, and the log-probabilities of softmax(logits / temperature) of all
        tokens from `begin`, which is at least 1. Also raises BadAnswer and Aborted."""

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float) -> Scored:
        """Scores with the weights that this server holds. Raises DomainError ENGINE_UNAVAILABLE, also when they are not
        known."""
        held = self.held
        if held is None:
            raise DomainError(Reason.ENGINE_UNAVAILABLE, f"{self.address} holds no known weights")
        try:
            rows = await gather_or_cancel(self._score_held(ids, temperature, held) for ids in sequences)
        except (Unreachable, RequestRefused, BadAnswer, Aborted) as error:
            raise DomainError(Reason.ENGINE_UNAVAILABLE, f"{self.address} cannot score: {error}") from error
        return Scored(tuple(rows), held.weights.policy_version)

    async def checksum(self) -> str:
        """Of all weights that it holds; empty if the engine has none. Raises DomainError ENGINE_UNAVAILABLE."""
        held = self.held
        try:
            checksum = await self._checksum()
            if self.guest:
                await self.probe()  # that it was not of other weights
        except (Unreachable, RequestRefused, Unsuitable) as error:
            raise DomainError(Reason.ENGINE_UNAVAILABLE, f"{self.address} tells no checksum: {error}") from error
        # The server's own checksum is of the base weights alone.
        return f"{checksum}+{held.weights.sha256}" if checksum and held is not None and held.adapter else checksum

    async def _score_held(self, ids: Sequence[int], temperature: float, held: TargetWeights) -> tuple[float, ...]:
        labels, row = await self.score_one(ids, 1, temperature, held.adapter)
        if {self.known_as(label) for label in labels} - {self.known_as(self.label)}:
            raise BadAnswer(f"it answers from weights {sorted(labels)} instead of {self.label!r}")
        return row

    @abstractmethod
    async def _told_label(self) -> str:
        """Of the weights that it holds now."""

    @abstractmethod
    async def _load(self, path: str, label: str) -> None:
        """Loads the weights of this folder under this label."""

    @abstractmethod
    async def _rename(self, label: str) -> None:
        """Gives the same weights another label."""

    @abstractmethod
    async def _checksum(self) -> str:
        """Of the base weights; empty if the engine has none."""
