"""Whether a text can be as few tokens as there is room for, found out without tokenising it whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_SHRINK = 4  # times that a normaliser makes a text shorter: NFKC makes three letters of Hangul one, and of Greek four
_SLACK = 2**20  # characters that templates and tokenizers leave out: white space, thoughts of earlier turns
_PIECE = 2**16  # characters
_SEAM = 16  # tokens that a text may have less than its pieces, for each piece: words that a cut went through


class MoreTokens(Exception):
    """A text has at least `count` tokens, and less would fit."""

    def __init__(self, count: int):
        super().__init__(f"at least {count} tokens")
        self.count = count


def most_characters(tokens: int, longest_token: int, slack: int = _SLACK) -> int:
    """A prompt of more characters has more than `tokens` tokens. `longest_token` is in bytes; a character has at least
    one.

    The bound is far above the length of real prompts, so that none that fits is refused: the longest tokens are runs of
    spaces and dashes. `slack` is for characters that become no token. A text is refused wrongly only if it has more of
    these than that: a text of almost nothing but white space, or of thoughts that the template drops.
    """
    return tokens * longest_token * _SHRINK + slack


def check_tokens_of(encode: Callable[[str], Sequence[int]], text: str, most: int) -> None:
    """Raises MoreTokens if the text surely has more than `most` tokens; 0: it may have any number. A text that is a
    little too long passes, and one that is short enough to be tokenised at once is not looked at.

    It takes the memory of one piece. A cut changes only the tokens beside it; `_SEAM` allows for them.
    """
    if not most or len(text) <= max(_PIECE, 2 * most):
        return
    count = 0
    for begin in range(0, len(text), _PIECE):
        count += max(0, len(encode(text[begin : begin + _PIECE])) - _SEAM)
        if count > most:
            raise MoreTokens(count)
