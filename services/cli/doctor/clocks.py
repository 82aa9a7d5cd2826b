"""Clocks. No answer of a service says what time it is there, but some have times of the past: one that lies in the
future here shows that its clock is ahead, or that of this machine behind."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from mulligan.cli.doctor.finding import Finding, Topic
from mulligan.common.addresses import is_loopback

_NOTICED = timedelta(seconds=5)


def judge_clock(topic: Topic, host: str, times: Sequence[datetime], now: datetime) -> Finding:
    """`times` are moments that were past for the service when it answered, and `now` was read before."""
    latest = max(times, default=None)
    if latest is not None and latest - now > _NOTICED:
        ahead = latest - now
        if is_loopback(host):
            said = f"The clock of this machine was set back: a record of the service is {_length(ahead)} ahead of it."
        else:
            said = f"The clock of {host} is at least {_length(ahead)} ahead of this machine's, or was."
        return topic.warning(said, "Have both machines set their clocks by NTP: credentials and certificates need it.")
    if is_loopback(host):
        return topic.ok("The service runs on this machine, with the same clock.")
    return topic.skipped("No answer of a service says what time it is there; none of its records lies in the future.")


def _length(time: timedelta) -> str:
    seconds = time.total_seconds()
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
