"""What checks of a memory service share: a scope of their own, and its calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from mulligan.conformance.report import NotApplicable, Violation, demand
from mulligan.conformance.target import CheckSession, Refusal
from mulligan.memory.v1 import memory_service_pb2 as pb

LATEST = pb.RETRIEVAL_STRATEGY_LATEST_SUCCESS
TOP_GAIN = pb.RETRIEVAL_STRATEGY_TOP_GAIN
BEST_UPLIFT = pb.RETRIEVAL_STRATEGY_BEST_UPLIFT
SIMILAR_WORDS = pb.RETRIEVAL_STRATEGY_SIMILAR_WORDS
SIMILAR_MEANING = pb.RETRIEVAL_STRATEGY_SIMILAR_MEANING
EXPLORE = pb.RETRIEVAL_STRATEGY_EXPLORE
BY_KEY = pb.RETRIEVAL_STRATEGY_BY_KEY
MIX = pb.RETRIEVAL_STRATEGY_MIX


async def with_evidence(session: CheckSession) -> Scope:
    """A scope at a server that has evidence, revisions and labels. Raises NotApplicable where it leaves them out."""
    await optional(session, "ListChanges", pb.ListChangesRequest(scope="conformance", page_size=1))
    return Scope(session)


async def optional(session: CheckSession, method: str, request: Any) -> Any:
    """The answer. Raises NotApplicable where the server leaves the call out."""
    answer = await session.attempt(method, request)
    if isinstance(answer, Refusal):
        if answer.code == "UNIMPLEMENTED":
            raise NotApplicable(f"the server leaves {method} out")
        raise Violation("this call is answered", answer, request)
    return answer


class Scope:
    """A scope with a random name, so that nobody else writes to it."""

    def __init__(self, session: CheckSession) -> None:
        self.session = session
        self.name = f"conformance-{uuid4()}"

    def request(self, request_id: str, text: str = "", **origin: Any) -> pb.AddReflectionRequest:
        provenance = {"run_id": "run", "experience_id": request_id, "environment": "lake", "task_id": "train/1"}
        given = {"policy_version": 3, "reward_before": 0.0, "reward_after": 1.0, "success": True} | origin
        return pb.AddReflectionRequest(
            request_id=request_id,
            scope=self.name,
            text=text or request_id,
            provenance=pb.Provenance(**(provenance | given)),  # type: ignore[arg-type]  # by name
        )

    async def add(self, request_id: str, text: str = "", **origin: Any) -> pb.AddReflectionResponse:
        return await self.send(self.request(request_id, text, **origin))

    async def labelled(self, request_id: str, text: str = "", **labels: Any) -> pb.AddReflectionResponse:
        request = self.request(request_id, text)
        request.MergeFrom(pb.AddReflectionRequest(**labels))
        return await self.send(request)

    async def send(self, request: pb.AddReflectionRequest) -> pb.AddReflectionResponse:
        added: Any = await self.session.attempt("AddReflection", request)
        if isinstance(added, Refusal):
            if added.metadata.get("field") == "embedding" and not request.embedding:
                raise NotApplicable("its callers bring embeddings, whose size is not known here")
            raise Violation("this call is answered", added, request)
        self.session.later("DeleteReflection", pb.DeleteReflectionRequest(reflection_id=added.reflection_id))
        return added  # type: ignore[no-any-return]  # a message of this call

    async def get(self, reflection_id: str) -> pb.StoredReflection:
        answer = await self.session.ask("GetReflection", pb.GetReflectionRequest(reflection_id=reflection_id))
        stored: pb.StoredReflection = answer.reflection
        return stored

    async def delete(self, reflection_id: str) -> int:
        request = pb.DeleteReflectionRequest(reflection_id=reflection_id)
        return int((await self.session.ask("DeleteReflection", request)).version)

    def query(self, limit: int = 1, strategy: Any = LATEST, **more: Any) -> pb.QueryReflectionsRequest:
        fields = {"environment": "lake"} | more
        return pb.QueryReflectionsRequest(scope=self.name, strategy=strategy, limit=limit, **fields)

    async def found(self, limit: int = 1, strategy: Any = LATEST, **more: Any) -> list[str]:
        answer = await self.session.ask("QueryReflections", self.query(limit, strategy, **more))
        return [reflection.text for reflection in answer.reflections]

    async def finds(self, demanded: str, texts: list[str], limit: int = 9, strategy: Any = LATEST, **more: Any) -> None:
        found = await self.found(limit, strategy, **more)
        demand(found == texts, f"{demanded}: {texts}", found, self.query(limit, strategy, **more))

    async def snapshot(self) -> tuple[int, int]:
        answer = await self.session.ask("GetSnapshot", pb.GetSnapshotRequest(scope=self.name))
        return answer.version, answer.reflection_count

    async def page(self, size: int = 0, token: str = "", deleted: bool = False) -> pb.ListReflectionsResponse:
        request = pb.ListReflectionsRequest(scope=self.name, page_size=size, page_token=token, include_deleted=deleted)
        page: pb.ListReflectionsResponse = await self.session.ask("ListReflections", request)
        return page

    async def query_answer(self, limit: int = 9, strategy: Any = EXPLORE, **more: Any) -> pb.QueryReflectionsResponse:
        answer: pb.QueryReflectionsResponse = await self.session.ask(
            "QueryReflections", self.query(limit, strategy, **more)
        )
        return answer

    def revision(self, reflection_id: str, expected: int, request_id: str = "", **change: Any) -> Any:
        return pb.ReviseReflectionRequest(
            reflection_id=reflection_id,
            request_id=request_id or f"{uuid4()}",
            expected_revision=expected,
            **change,
        )

    async def revise(self, reflection_id: str, expected: int, **change: Any) -> pb.ReviseReflectionResponse:
        revised: pb.ReviseReflectionResponse = await optional(
            self.session, "ReviseReflection", self.revision(reflection_id, expected, **change)
        )
        return revised

    async def erase(self, reflection_id: str) -> int:
        request = pb.EraseReflectionRequest(reflection_id=reflection_id)
        return int((await optional(self.session, "EraseReflection", request)).version)

    async def report(self, rewards: Sequence[tuple[str, float]]) -> int:
        """`rewards` are ids of uses with the reward of each. Returns how many counted."""
        outcomes = [pb.UseOutcome(use_id=use_id, reward=reward) for use_id, reward in rewards]
        request = pb.ReportOutcomeRequest(outcomes=outcomes)
        return int((await optional(self.session, "ReportOutcome", request)).counted)

    async def explain(self, reflection_id: str, max_uses: int = 0) -> pb.ExplainReflectionResponse:
        request = pb.ExplainReflectionRequest(reflection_id=reflection_id, max_uses=max_uses)
        explained: pb.ExplainReflectionResponse = await optional(self.session, "ExplainReflection", request)
        return explained
