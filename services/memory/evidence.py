"""Evidence on whether an entry helps: its uplift, estimated from uses in which a draw decided whether it was shown.

A use is an attempt for which the entry was retrieved. The entry was left out with a known probability p_out, and shown
otherwise. The attempt earned a reward from 0 to 1. The uplift is E[reward | shown] - E[reward | left out].

What it is a contrast of. A draw leaves out one of k retrieved entries with probability h (`draw.py`). The service adds
only uses in which no other entry was left out (`evidence_in` in `store.py`); given that, p_out = (h / k) / (1 - h +
h / k). So the uplift is the entry's own effect beside all the others. If uses without another entry counted as shown,
with p_out = h / k, the uplift would contain the others: if effects add up, it would be the own effect less h (k - 1) /
(k - h) times the mean effect of the others, and an entry without effect beside helpful ones would look harmful.

Score of a use. Let m1, m0 be the mean rewards of the two arms (shown, left out) in earlier uses. The doubly robust
score (AIPW; Robins, Rotnitzky and Zhao 1994) is

    X = m1 - m0 + Y,    Y = (reward - m1) / (1 - p_out) if shown, -(reward - m0) / p_out if left out

and E[X | past] is the use's uplift, whatever m1 and m0 are. Each use has the weight w = min(p_out, 1 - p_out), known
before it, which is about proportional to 1 / Var(X). So -1 <= w Y <= 1.

Capital. For a candidate m and a bet 0 < b < 1 that the uplift is above m,

    K(m, b) = product over uses of (1 + b w Y) exp(b w (m1 - m0 - m))

is never negative, and starts at 1. If u is the use's uplift, E[1 + b w Y | past] = 1 + b w (u - m1 + m0), which is at
most exp(b w (u - m1 + m0)). So K(u, b) is a supermartingale, and so is its mean over several b. It exceeds 1 / a at
any time with probability at most a (Ville). The bet that the uplift is below m has -b in the place of b. The interval
has the m that neither side has rejected, each at a = ALPHA / 2. This is betting (Waudby-Smith and Ramdas, arXiv
2010.15920, section 4) with scores of Waudby-Smith et al., arXiv 2210.10768. One thing differs: m is in the exponent,
as in their empirical Bernstein bounds, where a betting capital has 1 + b w (X - m). So a few sums are enough for every
m, and no grid is needed.

Guarantee. The probability that the interval of one entry ever misses its uplift, after any of its uses, is at most
ALPHA, if the uplift is the same in all uses. If it changes, the interval covers at all times, with the same
probability, the weighted mean of the uplifts of the uses so far, with weights w. The guarantee is for each entry, not
for all together. It needs that, given all uses that were added before, the entry is left out with probability p_out:
the order in which uses are added, and whether they are added, must not depend on the draw.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Of 400 simulations (50 harmful, 50 helpful, 100 entries without effect; an effect of 0.3; a balanced draw, 150 uses
# per arm), 398 found at least 48 of the harmful. All found at most 3 others harmful, and had at most 5 intervals
# without effect that ever missed 0. At 0.01, 6 simulations found too few harmful ones; at 0.05, 28 found too many
# others harmful.
ALPHA = 0.02

# Bets, and the share of the capital that each has. At 0.4 an effect of 0.3 is found within 150 uses per arm with the
# highest probability, from p_out 0.125 to 0.5. Large effects are found soonest by 0.8, small ones by the others.
_BETS: Floats = 0.8 * np.exp2(-np.arange(8.0))
_LOG_SHARES: Floats = np.log([0.06, 0.72, 0.10, 0.05, 0.03, 0.02, 0.01, 0.01])
_SIGNED_BETS: Floats = np.stack([_BETS, -_BETS])  # above, below
_LOG_LIMIT = math.log(2 / ALPHA)

_PRIOR_USES = 8.0  # so many uses at the mean of both arms are added to each arm's mean
_VERSION = 1  # of the bytes; another list of bets is another version
_HEAD = struct.Struct("<BI")  # version, CRC-32 of the rest
_BODY = struct.Struct(f"<2Q5d{_SIGNED_BETS.size}d")


class UseScore(NamedTuple):
    """Of one use. The expected value of `predicted + residual` is `weight` times the use's uplift."""

    weight: float  # w
    predicted: float  # w (m1 - m0)
    residual: float  # w Y, from -1 to 1


def score(reward: float, shown: bool, p_out: float, expected_shown: float, expected_left_out: float) -> UseScore:
    """The weighted score of a use; m1 and m0 are the rewards that were expected before it, each from 0 to 1."""
    weight = min(p_out, 1 - p_out)
    if shown:
        residual = weight / (1 - p_out) * (reward - expected_shown)
    else:
        residual = -weight / p_out * (reward - expected_left_out)
    return UseScore(weight, weight * (expected_shown - expected_left_out), residual)


class Evidence:
    """What the uses of one entry say about it. The same uses in the same order give the same state, bit by bit."""

    __slots__ = (
        "_logs",
        "_predicted",
        "_residual",
        "_reward_left_out",
        "_reward_shown",
        "_weight",
        "uses_left_out",
        "uses_shown",
    )

    def __init__(self) -> None:
        self.uses_shown = 0
        self.uses_left_out = 0
        self._reward_shown = 0.0  # sums of rewards
        self._reward_left_out = 0.0
        self._weight = 0.0  # sums of the parts of scores
        self._predicted = 0.0
        self._residual = 0.0
        self._logs: Floats = np.zeros_like(_SIGNED_BETS)  # sums of log(1 + b w Y), for each side and bet

    def add(self, reward: float, *, shown: bool, p_out: float) -> None:
        """A use: `p_out` is the probability with which the draw would have left the entry out. Raises ValueError for a
        reward outside of 0 to 1, or a `p_out` that is not between 0 and 1, both excluded."""
        if not 0 <= reward <= 1:
            raise ValueError(f"reward {reward}, not a number from 0 to 1")
        if not 0 < p_out < 1:
            raise ValueError(f"p_out {p_out}, not a number between 0 and 1, both excluded")
        use = score(reward, shown, p_out, *self._expected())
        self._weight += use.weight
        self._predicted += use.predicted
        self._residual += use.residual
        self._logs += np.log1p(_SIGNED_BETS * use.residual)
        if shown:
            self.uses_shown += 1
            self._reward_shown += reward
        else:
            self.uses_left_out += 1
            self._reward_left_out += reward

    def _expected(self) -> tuple[float, float]:
        """The rewards to expect in the next use, if the entry is shown and if it is left out."""
        pooled = (self._reward_shown + self._reward_left_out + 1) / (self.uses_shown + self.uses_left_out + 2)
        return (
            (self._reward_shown + _PRIOR_USES * pooled) / (self.uses_shown + _PRIOR_USES),
            (self._reward_left_out + _PRIOR_USES * pooled) / (self.uses_left_out + _PRIOR_USES),
        )

    @property
    def mean_shown(self) -> float | None:
        """Mean reward of the uses in which the entry was shown; None without any."""
        return self._reward_shown / self.uses_shown if self.uses_shown else None

    @property
    def mean_left_out(self) -> float | None:
        """Mean reward of the uses in which the entry was left out; None without any."""
        return self._reward_left_out / self.uses_left_out if self.uses_left_out else None

    @property
    def uplift(self) -> float | None:
        """The estimate, from -1 to 1: the weighted mean of the scores. It lies in the interval. None unless the entry
        was both shown and left out."""
        if not (self.uses_shown and self.uses_left_out):
            return None
        return min(max((self._predicted + self._residual) / self._weight, -1.0), 1.0)

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper limit of the uplift, from -1 to 1. The guarantee is at the top of the module."""
        # The capital depends on m only through s = m * weight. Its log falls with s on the side "above", and is
        # convex. So Newton's steps go up from the left and never pass the root. Of the side "below" -s is sought.
        logs = self._log_parts(0.0)
        s = ((logs - _LOG_LIMIT) / _BETS).max(axis=1)  # left of it: there one bet alone has reached the limit
        for _ in range(50):
            parts = logs - _BETS * s[:, None]
            log_capital: Floats = np.logaddexp.reduce(parts, axis=1)
            slope = np.exp(parts - log_capital[:, None]) @ _BETS
            step = np.maximum(log_capital - _LOG_LIMIT, 0) / slope
            s += step
            if np.all(step <= 1e-9 * (1 + np.abs(s))):
                break
        return self._limit(float(s[0])), self._limit(-float(s[1]))

    def _limit(self, s: float) -> float:
        """s as an uplift from -1 to 1. The weight may be too small to divide by."""
        return s / self._weight if abs(s) < self._weight else math.copysign(1.0, s)

    @property
    def harmful(self) -> bool:
        """Whether the interval is below 0."""
        return self.log_capital(0.0)[1] > _LOG_LIMIT

    @property
    def helpful(self) -> bool:
        """Whether the interval is above 0."""
        return self.log_capital(0.0)[0] > _LOG_LIMIT

    def log_capital(self, uplift: float) -> tuple[float, float]:
        """Natural logarithms of the capital of the bets that the true uplift is above and below this one."""
        above, below = np.logaddexp.reduce(self._log_parts(uplift), axis=1)
        return float(above), float(below)

    def _log_parts(self, uplift: float) -> Floats:
        """Log of what each bet has, for each side."""
        return _LOG_SHARES + self._logs + _SIGNED_BETS * (self._predicted - self._weight * uplift)

    def to_bytes(self) -> bytes:
        """The state, little-endian, in 189 bytes."""
        sums = (self._reward_shown, self._reward_left_out, self._weight, self._predicted, self._residual)
        body = _BODY.pack(self.uses_shown, self.uses_left_out, *sums, *self._logs.flat)
        return _HEAD.pack(_VERSION, zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The state that `to_bytes` wrote. Raises ValueError for bytes that are damaged or of another version."""
        if data[:1] not in (b"", bytes([_VERSION])):
            raise ValueError(f"evidence of version {data[0]}, expected {_VERSION}")
        if len(data) != _HEAD.size + _BODY.size:
            raise ValueError(f"evidence of {len(data)} bytes, expected {_HEAD.size + _BODY.size}")
        _, checksum = _HEAD.unpack_from(data)
        if checksum != zlib.crc32(data[_HEAD.size :]):
            raise ValueError("evidence is damaged: its checksum differs")
        evidence = cls()
        evidence.uses_shown, evidence.uses_left_out, *rest = _BODY.unpack_from(data, _HEAD.size)
        evidence._reward_shown, evidence._reward_left_out, evidence._weight, *rest = rest
        evidence._predicted, evidence._residual, *logs = rest
        evidence._logs = np.array(logs).reshape(_SIGNED_BETS.shape)
        return evidence
