"""Authorisation: who has not the right credential is refused, whatever else fails; who has it is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mulligan.common.access import AccessRole, needed_role
from mulligan.testing.judge.history import BrokenRule, RecordedCall

RULE = "access"
NO_TOKEN = "none"  # what a stranger may have instead of a role's token
UNKNOWN_TOKEN = "unknown"
NO_RUN = "trainer, no run"  # the role of a trainer, for what needs the credential of a run besides
OTHER_RUN = "trainer, another run"
_OUTSIDE = (NO_RUN, OTHER_RUN)
# Why such a call may be refused: an entry is looked for before its scope is known.
_KEPT_OUT = ("RUN_CREDENTIAL", "UNKNOWN_REFLECTION", "CALLER_LIMIT")
_REFUSED = ("UNAUTHENTICATED", "PERMISSION_DENIED")


def check(calls: Sequence[RecordedCall]) -> Iterator[BrokenRule]:
    for call in calls:
        if not call.credential:
            if call.code in _REFUSED:
                yield BrokenRule(RULE, "the right credential was refused", (call,))
        elif call.credential in _OUTSIDE:
            if call.answer is not None:
                yield BrokenRule(RULE, f"what is the run's was given to a caller with {call.credential!r}", (call,))
            elif call.refused and call.reason not in _KEPT_OUT:
                yield BrokenRule(RULE, f"the call of a caller with {call.credential!r} was looked at", (call,))
        elif not _may(call):
            if call.answer is not None:
                yield BrokenRule(RULE, f"a call was answered to a caller with {call.credential!r}", (call,))
            elif call.refused and call.code not in _REFUSED:
                yield BrokenRule(RULE, f"the call of a caller with {call.credential!r} was looked at", (call,))
        elif call.code in _REFUSED:
            yield BrokenRule(RULE, f"the role {call.credential!r} was refused", (call,))


def _may(call: RecordedCall) -> bool:
    needed = needed_role(call.method)
    if needed is None:
        return True
    if call.credential in (NO_TOKEN, UNKNOWN_TOKEN):
        return False
    return AccessRole(call.credential).includes(needed)
