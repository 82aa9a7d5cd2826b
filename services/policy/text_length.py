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
    """A prompt of more characters has more than so many tokens. `longest_token` is in bytes, of which a character has
    at least one.

    It is far more than any prompt has in practice, because a prompt that fits must never be refused: the longest tokens
    are runs of spaces and dashes, and `_SLACK` is for what no bound of tokens holds for. What is longer all the same
    and comes to few tokens is a text that is nearly all white space, or nearly all thoughts that the template drops.
    """
    return tokens * longest_token * _SHRINK + slack


def check_tokens_of(encode: Callable[[str], Sequence[int]], text: str, most: int) -> None:
    """Raises MoreTokens if the text has more than `most` tokens; 0: it may have any number. It tells no texts apart
    that are a little longer, and looks at none that is short enough to be tokenised at once.

    The memory is that of one piece. A cut changes the tokens beside it alone, and `_SEAM` makes up for that.
    """
    if not most or len(text) <= max(_PIECE, 2 * most):
        return
    count = 0
    for begin in range(0, len(text), _PIECE):
        count += max(0, len(encode(text[begin : begin + _PIECE])) - _SEAM)
        if count > most:
            raise MoreTokens(count)
