"""The text of one answer while its tokens arrive, up to the first stop string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flexgen_bench.engine.incremental_decoder import IncrementalDecoder


class TextStream:
    """Takes tokens, gives text that is sure: that completes to no other character and begins no
    stop string.

    A stop string ends the text before it. One that holds a special token's text (``<|im_end|>``) is
    looked for in the text with special tokens, any other one in the text that is shown; special
    tokens are shown in neither case.

    decoder: None where there is no tokenizer; the text stays empty then. special: the text of each
    special token. count: tokens taken so far. stopped: whether a stop string has ended the text;
    what comes after it is ignored.
    """

    def __init__(
        self, decoder: IncrementalDecoder | None, special: Mapping[int, str], stop: Sequence[str] = ()
    ) -> None:
        self._decoder, self._special = decoder, special
        with_special = tuple(s for s in stop if any(t and t in s for t in special.values()))
        without_special = tuple(s for s in stop if s not in with_special)
        self._shown_text = _StopStrings(without_special)
        self._whole_text = _StopStrings(with_special)
        self._given: list[str] = []
        self._taken = 0  # of these, by ``take_new``
        self._num_given = 0  # characters
        self._held = ""  # text that may yet be part of a stop string
        self.count = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text given so far."""
        return "".join(self._given)

    def take_new(self) -> str:
        """What was given since it was asked for last."""
        new = "".join(self._given[self._taken :])
        self._taken = len(self._given)
        return new

    def put(self, token: int) -> str:
        """The new text that is sure with this token."""
        self.count += 1
        if self.stopped or self._decoder is None:
            return ""
        shown = self._decoder.put(token)
        end = self._look(shown, self._special.get(token, ""))
        if end is not None:
            self.stopped = True
            return self._give(end)
        return self._give(min(self._shown_text.begins_at, self._whole_text.begins_at))

    def follow(self, tokens: Sequence[int]) -> bool:
        """Put what is new in ``tokens``, all tokens so far. Whether a stop string has ended the
        text."""
        for token in tokens[self.count :]:
            self.put(token)
        return self.stopped

    def finish(self) -> str:
        """The rest: there will be no more tokens. An incomplete character is shown as U+FFFD."""
        if self.stopped or self._decoder is None:
            return ""
        end = self._look(self._decoder.finish(), "")
        self.stopped = end is not None
        return self._give(self._length if end is None else end)

    @property
    def _length(self) -> int:
        return self._num_given + len(self._held)

    def _look(self, shown: str, hidden: str) -> int | None:
        """How many characters stand before the first stop string, if it is there now."""
        before = self._length
        self._held += shown
        places = range(before, before + len(shown))
        self._shown_text.put(shown, places)
        self._whole_text.put(shown + hidden, [*places, *[self._length] * len(hidden)])
        starts = [f for f in (self._shown_text.found_at, self._whole_text.found_at) if f is not None]
        return min(starts, default=None)

    def _give(self, end: int) -> str:
        """Text up to the character of this number."""
        size = max(0, min(end, self._length) - self._num_given)
        given, self._held = self._held[:size], self._held[size:]
        self._num_given += size
        self._given.append(given)
        return given


# Beyond every text.
_NOWHERE = 2**62


@dataclass
class _StopStrings:
    """Looks for strings in text that comes in pieces; keeps no more of it than the longest string
    may need.

    found_at: the place where the first of them begins. begins_at: where one might begin that is not
    complete yet.
    """

    stop: tuple[str, ...]
    found_at: int | None = None
    begins_at: int = _NOWHERE
    _text: str = ""
    _places: list[int] = field(default_factory=list)  # of the characters of the text

    def put(self, piece: str, places: Sequence[int]) -> None:
        """places: of each character of the piece, how many shown ones stand before it."""
        if not self.stop or not piece:
            return
        self._text += piece
        self._places += places
        offsets = [at for s in self.stop if (at := self._text.find(s)) >= 0]
        if offsets:
            self.found_at = self._places[min(offsets)]
            return
        surplus = max(0, len(self._text) - max(map(len, self.stop)) + 1)
        self._text, self._places = self._text[surplus:], self._places[surplus:]
        starts = (i for i in range(len(self._text)) if self._may_begin(self._text[i:]))
        first = next(starts, None)
        self.begins_at = _NOWHERE if first is None else self._places[first]

    def _may_begin(self, end: str) -> bool:
        return any(s.startswith(end) for s in self.stop)
