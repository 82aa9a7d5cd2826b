"""Violations of the memory contract, for `faulty_proxy.py` to plant."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from mulligan.memory.v1 import memory_service_pb2 as pb
from tests.support.faulty_proxy import Fault


class MemoryFault(Fault):
    service = "memory"


class ForgetsRequests(MemoryFault):
    title = "a repeated call returns the first answer and makes no version, also after forgetting"
    call = "AddReflection"

    def before(self, request: Any) -> None:
        request.request_id = str(uuid4())


class ReusesRequests(MemoryFault):
    title = "a request_id in use for another reflection is ALREADY_EXISTS REQUEST_CONFLICT"
    call = "AddReflection"
    error = "REQUEST_CONFLICT"
    instead = pb.AddReflectionResponse(reflection_id="x", version=1)


class CutsTexts(MemoryFault):
    title = "what is added is read back whole"
    call = "GetReflection"

    def after(self, request: Any, answer: Any) -> None:
        answer.reflection.text = answer.reflection.text.strip("\n\x00\t x")


class CountsFromZero(MemoryFault):
    title = "every write makes a new version of its scope, counted from 1"
    call = "AddReflection"

    def after(self, request: Any, answer: Any) -> None:
        answer.version -= 1


class ReadsTheNewest(MemoryFault):
    title = "a read as of a version sees exactly that version"
    call = "QueryReflections"

    def before(self, request: Any) -> None:
        request.ClearField("as_of_version")


class IgnoresGains(MemoryFault):
    title = "TOP_GAIN finds the successful ones with the greatest gain; among equals the latest"
    call = "QueryReflections"

    def before(self, request: Any) -> None:
        request.strategy = pb.RETRIEVAL_STRATEGY_LATEST_SUCCESS


class NewestFirst(MemoryFault):
    title = "page by page it lists a scope, oldest first"
    call = "ListReflections"

    def after(self, request: Any, answer: Any) -> None:
        answer.reflections.reverse()


class KnowsEverything(MemoryFault):
    title = "an unknown reflection is NOT_FOUND UNKNOWN_REFLECTION"
    call = "GetReflection"
    error = "UNKNOWN_REFLECTION"
    instead = pb.GetReflectionResponse()


class NoDetails(MemoryFault):
    title = "a version that is not reached yet is OUT_OF_RANGE UNKNOWN_VERSION"
    call = "QueryReflections"
    error = "UNKNOWN_VERSION"


class _Query(MemoryFault):
    call = "QueryReflections"


class ForgetsTags(MemoryFault):
    title = "kind, key, tags and sources are read back; without them it is a rule, and a candidate"
    call = "GetReflection"

    def after(self, request: Any, answer: Any) -> None:
        answer.reflection.ClearField("tags")


class IgnoresLabels(MemoryFault):
    title = "a repeated call with other labels is ALREADY_EXISTS REQUEST_CONFLICT"
    call = "AddReflection"
    error = "REQUEST_CONFLICT"
    instead = pb.AddReflectionResponse(reflection_id="x", version=1)


class AnySource(MemoryFault):
    title = "a source that is not in the scope is NOT_FOUND UNKNOWN_REFLECTION, and stores nothing"
    call = "AddReflection"

    def before(self, request: Any) -> None:
        request.ClearField("source_ids")


class AnyLabel(MemoryFault):
    title = "bad labels are INVALID_ARGUMENT INVALID_FIELD and named"
    call = "AddReflection"
    error = "INVALID_FIELD"
    instead = pb.AddReflectionResponse(reflection_id="x", version=1)


class ForgetsAnswers(MemoryFault):
    title = "unless_known adds nothing where an entry has the text, and answers with that entry"
    call = "AddReflection"

    def before(self, request: Any) -> None:
        if request.unless_known:
            request.request_id = str(uuid4())


class StoresAll(MemoryFault):
    title = "of calls with unless_known and one text that come at the same time, one adds it"
    call = "AddReflection"

    def before(self, request: Any) -> None:
        request.unless_known = False


class AddsInReverse(MemoryFault):
    title = "each item is what AddReflection stores, in a version of its own and in their order"
    call = "AddReflections"

    def before(self, request: Any) -> None:
        reflections = list(reversed(request.reflections))
        del request.reflections[:]
        request.reflections.extend(reflections)


class AddsAgain(MemoryFault):
    title = "a repeated item returns the first answer and makes no version"
    call = "AddReflections"

    def before(self, request: Any) -> None:
        for one in request.reflections:
            one.request_id = str(uuid4())


class HidesRefusals(MemoryFault):
    title = "an item that is refused has the error of AddReflection, and the others are stored"
    call = "AddReflections"

    def after(self, request: Any, answer: Any) -> None:
        for item in answer.items:
            if item.HasField("error"):
                item.added.CopyFrom(pb.AddReflectionResponse(reflection_id="x", version=1))


class StoresTheWellFormed(MemoryFault):
    title = "a malformed call is INVALID_ARGUMENT INVALID_FIELD and named, and stores nothing"
    call = "AddReflections"
    error = "INVALID_FIELD"
    instead = pb.AddReflectionsResponse()


class IgnoresKeys(_Query):
    title = "BY_KEY finds all of a key, the latest first, also without a success"

    def before(self, request: Any) -> None:
        request.ClearField("key")
        request.strategy = pb.RETRIEVAL_STRATEGY_EXPLORE


class IgnoresTasks(_Query):
    title = "kinds, key, tags and task_prefix leave out what does not fit, for each strategy"

    def before(self, request: Any) -> None:
        request.ClearField("task_prefix")


class NoBudget(_Query):
    title = "max_tokens leaves out the entries that do not fit; a token is four bytes"

    def before(self, request: Any) -> None:
        request.max_tokens = 0


class BelievesClaims(_Query):
    title = "BEST_UPLIFT and EXPLORE begin with the latest where nothing was tried"

    def before(self, request: Any) -> None:
        request.strategy = pb.RETRIEVAL_STRATEGY_TOP_GAIN


class NoticesNoRepetition(_Query):
    title = "BEST_UPLIFT begins with what was written last, also where the text was known"

    def before(self, request: Any) -> None:
        if request.strategy == pb.RETRIEVAL_STRATEGY_BEST_UPLIFT:
            request.strategy = pb.RETRIEVAL_STRATEGY_EXPLORE


class WorstWordsFirst(_Query):
    title = "SIMILAR_WORDS finds the entries that share words, those that share rare ones first"

    def after(self, request: Any, answer: Any) -> None:
        answer.reflections.reverse()


class MeansNothing(_Query):
    title = "SIMILAR_MEANING finds a text by itself, or is FAILED_PRECONDITION NO_EMBEDDER"

    def before(self, request: Any) -> None:
        request.text = request.text and "quartz"


class MixesInReverse(_Query):
    title = "MIX finds some of each strategy, in its order, without near-duplicates"

    def before(self, request: Any) -> None:
        request.mix.reverse()


class AnyQuery(_Query):
    title = "what a strategy needs and lacks, or does not take, is INVALID_ARGUMENT INVALID_FIELD"
    error = "INVALID_FIELD"
    instead = pb.QueryReflectionsResponse()


class RewritesThePast(_Query):
    title = "what is named is rewritten, the rest stays; older versions keep what they had"

    def before(self, request: Any) -> None:
        request.ClearField("as_of_version")


class _Revise(MemoryFault):
    call = "ReviseReflection"


class RevisesAgain(_Revise):
    title = "a repeated call returns the first answer and changes nothing"

    def before(self, request: Any) -> None:
        request.request_id = str(uuid4())


class TakesAnotherChange(_Revise):
    title = "a repeated call with another change is ALREADY_EXISTS REQUEST_CONFLICT"
    error = "REQUEST_CONFLICT"
    instead = pb.ReviseReflectionResponse(revision=2, version=2)


class SilentConflicts(_Revise):
    title = "a revision that is not the newest is ABORTED REVISION_CONFLICT, with the newest"
    error = "REVISION_CONFLICT"


class RewritesEpisodes(_Revise):
    title = "the text of an episode is never rewritten: FAILED_PRECONDITION RAW_ENTRY"
    error = "RAW_ENTRY"
    instead = pb.ReviseReflectionResponse(revision=3, version=3)


class RetiresNobody(_Revise):
    title = "RETIRED ones are not retrieved until they are CANDIDATE again"

    def before(self, request: Any) -> None:
        request.status = pb.REFLECTION_STATUS_CANDIDATE


class RevisesTheForgotten(_Revise):
    title = "an unknown reflection, and a forgotten one, are NOT_FOUND UNKNOWN_REFLECTION"
    error = "UNKNOWN_REFLECTION"
    instead = pb.ReviseReflectionResponse(revision=3, version=4)


class AnyRevision(_Revise):
    title = "a bad field, or no change, is INVALID_ARGUMENT INVALID_FIELD and changes nothing"
    error = "INVALID_FIELD"
    instead = pb.ReviseReflectionResponse(revision=3, version=3)


class KeepsErased(MemoryFault):
    title = "text, key and tags are gone, also those of older revisions; the rest stays on record"
    call = "GetReflection"

    def after(self, request: Any, answer: Any) -> None:
        answer.reflection.key = answer.reflection.key or "secret"


class ReadsTheErased(_Query):
    title = "an older version that had it is DATA_LOSS SNAPSHOT_REDACTED, and others can be read"
    error = "SNAPSHOT_REDACTED"
    instead = pb.QueryReflectionsResponse(version=2)


class ErasesAgain(MemoryFault):
    title = "erasing again changes nothing, and an unknown one is NOT_FOUND UNKNOWN_REFLECTION"
    call = "EraseReflection"

    def __init__(self) -> None:
        self._calls = 0

    def after(self, request: Any, answer: Any) -> None:
        answer.version += self._calls
        self._calls += 1


class ErasesAnyRevision(MemoryFault):
    title = "as DeleteReflection: a revision that is not the newest is ABORTED REVISION_CONFLICT"
    call = "EraseReflection"
    error = "REVISION_CONFLICT"
    instead = pb.EraseReflectionResponse(version=2)


class UsesInReverse(_Query):
    title = "a trial draws a use for each key, in which at most one retrieved entry is left out"

    def after(self, request: Any, answer: Any) -> None:
        answer.uses.reverse()


class ShowsAll(_Query):
    title = "each entry is left out with the same probability, and none with holdout 0"

    def after(self, request: Any, answer: Any) -> None:
        for use in answer.uses:
            use.left_out_id = ""


class DrawsAgain(_Query):
    title = "what a use leaves out follows from seed, key and entries"

    def after(self, request: Any, answer: Any) -> None:
        for use in answer.uses:
            use.use_id = str(uuid4())


class DrawsForOthers(_Query):
    title = "a key that was drawn for other entries is ALREADY_EXISTS REQUEST_CONFLICT"
    error = "REQUEST_CONFLICT"
    instead = pb.QueryReflectionsResponse(version=3)


class CountsAgain(MemoryFault):
    title = "a use counts once, and a report makes a version"
    call = "ReportOutcome"

    def after(self, request: Any, answer: Any) -> None:
        answer.counted = len(request.outcomes)


class AnyUse(MemoryFault):
    title = "an unknown use is NOT_FOUND UNKNOWN_USE, which names it, and nothing is recorded"
    call = "ReportOutcome"
    error = "UNKNOWN_USE"
    instead = pb.ReportOutcomeResponse(counted=2)


class FarFromTheEstimate(MemoryFault):
    title = "an entry's uplift has its uses, their mean rewards, and an interval around the estimate"
    call = "GetReflection"

    def after(self, request: Any, answer: Any) -> None:
        answer.reflection.uplift.lower = 0.5


class TrustsHarm(_Query):
    title = "an entry that does harm is QUARANTINED: EXPLORE alone retrieves it, behind the others"

    def before(self, request: Any) -> None:
        request.strategy = pb.RETRIEVAL_STRATEGY_EXPLORE


class KeepsEvidence(MemoryFault):
    title = "a new text starts without evidence, as a candidate"
    call = "GetReflection"

    def after(self, request: Any, answer: Any) -> None:
        answer.reflection.status = pb.REFLECTION_STATUS_QUARANTINED


class OldestUsesFirst(MemoryFault):
    title = "it lists the latest uses first, with their rewards, and where the entry comes from"
    call = "ExplainReflection"

    def after(self, request: Any, answer: Any) -> None:
        answer.uses.reverse()


class LogsTexts(MemoryFault):
    title = "it lists every write of a scope, oldest first, page by page, without any text"
    call = "ListChanges"

    def after(self, request: Any, answer: Any) -> None:
        for change in answer.changes:
            change.detail = "penguin"


class KnowsNobody(MemoryFault):
    title = "who wrote is what the call's metadata says as `mulligan-actor`"
    call = "ListChanges"

    def after(self, request: Any, answer: Any) -> None:
        for change in answer.changes:
            change.actor = "somebody"


class AnyToken(MemoryFault):
    title = "a page token that it did not make is INVALID_ARGUMENT BAD_PAGE_TOKEN"
    call = "ListChanges"
    error = "BAD_PAGE_TOKEN"


class FirstContract(MemoryFault):
    """A server of the contract's first version: it knows neither the later calls nor the later fields."""

    call = "AddReflection"
    left_out = frozenset(
        {"AddReflections", "ReviseReflection", "EraseReflection", "ReportOutcome", "ExplainReflection", "ListChanges"}
    )

    def before(self, request: Any) -> None:
        for name in ("kind", "key", "tags", "source_ids", "embedding", "unless_known"):
            request.ClearField(name)
