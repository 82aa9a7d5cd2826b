"""The history of a run: each client call, with what it asked, what it was answered, and when.

A history is a folder of files, one of each process that called, of JSON objects, one a line. A call is two lines: one
before it is made, and one when it has ended. A call without the second one may have been carried out or not; so may one
that failed without a reason of the contract.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mulligan.common.status import code_name

# What a call fails with that was not carried out, beside what has a reason of the contract.
_REFUSALS = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED", "INVALID_ARGUMENT"})
# Calls for several: the call that each of them is, where the requests are, and the field of an item's answer.
SEVERAL = {
    "StartEpisodes": ("StartEpisode", "starts", "episode"),
    "AddReflections": ("AddReflection", "reflections", "added"),
}


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One call. `request` and `answer` have the fields that are set, by their names in the contract; long lists of
    numbers are their lengths. `digest` is of the whole request, `answer_digest` of the whole answer. `answer` is None
    without one; of a stream it has the items of all messages, also where `code` says that it broke off later. `whole`
    is the whole request in base64, of calls that the judge carries out again.

    `caller` names the process. `credential` is empty for a caller's own; of a stranger it says what it had instead.
    Times are seconds of the machine's monotonic clock.
    """

    number: int  # in the history, in the order in which they began
    caller: str
    credential: str
    method: str  # as gRPC names it: /package.Service/Call
    request: dict[str, Any]
    digest: str
    start: float
    end: float = float("inf")  # of a call without an end: its caller was killed
    answer: dict[str, Any] | None = None
    answer_digest: str = ""
    code: str = ""  # of gRPC, of a call that failed
    reason: str = ""  # of the contract
    whole: str = ""

    @property
    def name(self) -> str:
        return self.method.rpartition("/")[2]

    @property
    def ok(self) -> bool:
        return self.answer is not None and not self.code

    @property
    def refused(self) -> bool:
        """Whether it was not carried out, for sure."""
        return bool(self.reason) or self.code in _REFUSALS

    def __str__(self) -> str:
        said = self.code or ("OK" if self.answer is not None else "no answer")
        shown = " ".join(f"{name}={value!r}"[:80] for name, value in self.request.items())
        return f"#{self.number} {self.caller} {self.name}({shown[:200]}) → {said}{' ' * bool(self.reason)}{self.reason}"


@dataclass(frozen=True, slots=True)
class BrokenRule:
    """A rule that does not hold, and the calls that show it."""

    rule: str
    text: str
    calls: tuple[RecordedCall, ...] = ()

    def __str__(self) -> str:
        return "\n  ".join([f"{self.rule}: {self.text}", *map(str, self.calls[:4])])


def read(folder: Path) -> list[RecordedCall]:
    """All calls of the history's files, in the order in which they began."""
    found = [call for file in sorted(folder.glob("*.jsonl")) for call in _of_file(file)]
    return numbered(found)


def numbered(calls: Iterable[RecordedCall]) -> list[RecordedCall]:
    """In the order in which they began, with numbers from 1."""
    ordered = sorted(calls, key=lambda call: call.start)
    return [replace(call, number=number) for number, call in enumerate(ordered, 1)]


def named(calls: Sequence[RecordedCall], *names: str) -> list[RecordedCall]:
    """Those of callers that had their own credential, with one of these names. A call that starts or adds several is
    one StartEpisode or AddReflection for each of them."""
    own = (one for call in calls if not call.credential for one in _singles(call))
    return [call for call in own if call.name in names]


def _singles(call: RecordedCall) -> Iterator[RecordedCall]:
    if call.name not in SEVERAL:
        yield call
        return
    name, requests, result = SEVERAL[call.name]
    method = f"{call.method.rpartition('/')[0]}/{name}"
    for number, request in enumerate(call.request[requests]):
        one = replace(call, method=method, request=request)
        if call.answer is None:
            yield one
            continue
        item = call.answer["items"][number]
        error = item.get("error", {})
        code = code_name(error["code"]) if error else ""
        yield replace(one, answer=item.get(result), code=code, reason=error.get("reason", ""))


def _of_file(file: Path) -> Iterator[RecordedCall]:
    begun: dict[int, dict[str, Any]] = {}
    for line in file.read_bytes().split(b"\n")[:-1]:  # what a kill cut off has no line break
        noted = json.loads(line)
        if "method" in noted:
            begun[noted.pop("call")] = noted
        else:
            yield RecordedCall(0, **begun.pop(noted.pop("call")), **noted)
    for left in begun.values():
        yield RecordedCall(0, **left)
