"""What a run reads of the memory, and what it writes into it: settings that every algorithm has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, Self

from pydantic import ConfigDict, Field, model_validator

from mulligan.common.number_settings import NumberSettings
from mulligan.common.plugins import PluginSettings, located
from mulligan.common.reflections import MixPart, RetrievalStrategy

__all__ = ["MemoryPartSettings", "MemoryReaders", "MemoryUseSettings", "MemoryWrites"]

_MOST_ENTRIES = 100  # of a query
_LONGEST_KEY = 200  # as the memory's contract has it
_BY_CLAIMS = (RetrievalStrategy.LATEST_SUCCESS, RetrievalStrategy.TOP_GAIN)
_BY_TEXT = (RetrievalStrategy.SIMILAR_WORDS, RetrievalStrategy.SIMILAR_MEANING)
_HOLDOUT = 0.25


class MemoryReaders(StrEnum):
    REFLECTOR = "reflector"
    FIRST = "first"
    BOTH = "both"

    @property
    def reflect(self) -> bool:
        """Whether reflectors read."""
        return self is not MemoryReaders.FIRST

    @property
    def play(self) -> bool:
        """Whether first attempts read."""
        return self is not MemoryReaders.REFLECTOR


class MemoryWrites(StrEnum):
    SUCCESSES = "successes"
    ALL = "all"
    NONE = "none"

    def takes(self, solved: bool) -> bool:
        """Whether a reflection is written whose attempt solved the task, or did not."""
        return self is MemoryWrites.ALL or (self is MemoryWrites.SUCCESSES and solved)


class MemoryPartSettings(NumberSettings):
    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: RetrievalStrategy
    limit: int = Field(1, ge=1, le=_MOST_ENTRIES)


class MemoryUseSettings(PluginSettings):
    """Mirrors the fields `memory_…` of `AlgorithmConfig` of `mulligan.trainer.v1`."""

    memory_strategy: RetrievalStrategy = RetrievalStrategy.LATEST_SUCCESS
    memory_mix: tuple[MemoryPartSettings, ...] = Field((), max_length=8)
    memory_entries: int = Field(0, ge=0, le=_MOST_ENTRIES)
    memory_tokens: int = Field(0, ge=0, lt=2**31)
    memory_holdout: float | None = Field(None, ge=0, le=0.5)
    memory_readers: MemoryReaders = MemoryReaders.REFLECTOR
    memory_writes: MemoryWrites = MemoryWrites.SUCCESSES
    memory_episodes: bool = False
    memory_family: bool = False
    memory_scope: str | None = None
    memory_document: str = Field("", max_length=_LONGEST_KEY)

    @model_validator(mode="before")
    @classmethod
    def _document_is_read(cls, table: Any) -> Any:
        """Who names a document and no strategy means to read it."""
        if isinstance(table, Mapping) and table.get("memory_document") and "memory_strategy" not in table:
            return {**table, "memory_strategy": RetrievalStrategy.BY_KEY}
        return table

    @model_validator(mode="after")
    def _document_can_be_written(self) -> Self:
        if not self.memory_document:
            return self
        if self.memory_writes is MemoryWrites.NONE:
            problem = 'expected nothing, as memory_writes = "none": no reflection would rewrite the document'
            raise located({("memory_document",): problem})
        if self.by_claims:
            problem = (
                'expected "by_key", or a strategy by what was measured, as memory_document is set: the success that '
                "the writer of its first text claims says nothing of later texts"
            )
            raise located({("memory_strategy",): problem})
        if self.memory_family:
            problem = "expected false, as memory_document is set: it is of all tasks of its environment"
            raise located({("memory_family",): problem})
        return self

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        mixes = self.memory_strategy is RetrievalStrategy.MIX
        if mixes != bool(self.memory_mix):
            wanted = "at least one part" if mixes else "nothing"
            problem = f'expected {wanted}, as memory_strategy = "{self.memory_strategy}"'
            raise located({("memory_mix",): problem})
        if sum(part.limit for part in self.memory_mix) > _MOST_ENTRIES:
            raise located({("memory_mix",): f"expected at most {_MOST_ENTRIES} entries in the sum of the limits"})
        for field, strategy in self.strategies:
            if problem := self._problem(strategy, nested=field != "memory_strategy"):
                raise located({tuple(field.split(".")): f'expected another strategy than "{strategy}"{problem}'})
        return self

    def _problem(self, strategy: RetrievalStrategy, *, nested: bool) -> str:
        """Why it cannot be asked; empty if it can."""
        if nested and strategy is RetrievalStrategy.MIX:
            return ", which is not nested"
        if nested and strategy is RetrievalStrategy.BY_KEY:
            return ": a mix has no key to ask for"
        if strategy is RetrievalStrategy.BY_KEY and not self.memory_document:
            return ", or a key to ask for in memory_document"
        return ""

    @property
    def strategies(self) -> Iterator[tuple[str, RetrievalStrategy]]:
        """All that are asked, each with the setting that names it."""
        yield "memory_strategy", self.memory_strategy
        for index, part in enumerate(self.memory_mix):
            yield f"memory_mix[{index}].strategy", part.strategy

    @property
    def mix(self) -> tuple[MixPart, ...]:
        return tuple(MixPart(part.strategy, part.limit) for part in self.memory_mix)

    @property
    def by_claims(self) -> bool:
        """Whether the strategy is one of the paper's, which goes by what writers claim."""
        return self.memory_strategy in _BY_CLAIMS

    @property
    def compares(self) -> bool:
        """Whether entries are compared with a text."""
        return any(strategy in _BY_TEXT for _, strategy in self.strategies)

    @property
    def holdout(self) -> float:
        """`memory_holdout`, or its default."""
        if self.memory_holdout is not None:
            return self.memory_holdout
        return 0.0 if self.by_claims else _HOLDOUT
