"""Text from tokens as they come, held back where it is not certain yet, and cut where a stop string begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer shows for bytes of half a character


class TextStream:
    """The text of one row. ``text`` is what was given out; after ``stopped`` nothing more comes."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.text, self.stopped = "", False
        self._tokens: list[int] = []
        self._start = 0  # tokens before it are decoded for good
        self._shown = 0  # characters of the tokens from there that are in ``_pending`` or out already
        self._pending = ""

    def push(self, token: int) -> str:
        """The text that one more token makes certain."""
        self._tokens.append(token)
        window = self._decode(self._start)
        if window.endswith(_UNFINISHED):
            return ""
        fresh = window[self._shown :]
        if (
            len(self._tokens) - self._start > 16 and fresh
        ):  # a window that begins inside the text keeps its first spaces
            self._start = len(self._tokens) - 8
            window = self._decode(self._start)
        self._shown = len(window)
        return self._release(fresh)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        rest = self._decode(self._start)[self._shown :]
        self._shown += len(rest)
        out = self._release(rest)
        if self.stopped:
            return out
        rest, self._pending = self._pending, ""
        self.text += rest
        return out + rest

    def _decode(self, start: int) -> str:
        text: str = self.tokenizer.decode(self._tokens[start:], skip_special_tokens=True)
        return text

    def _release(self, fresh: str) -> str:
        self._pending += fresh
        found = [place for stop in self.stop if (place := self._pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            out, self._pending = self._pending[: min(found)], ""
        else:
            keep = self._begun()
            out, self._pending = self._pending[: len(self._pending) - keep], self._pending[len(self._pending) - keep :]
        self.text += out
        return out

    def _begun(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        lengths = range(min(longest, len(self._pending)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._pending[-n:]) for stop in self.stop)), 0)
