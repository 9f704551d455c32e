"""Which keys and values of requests that have ended stay, for those that begin alike: turns of a conversation, what an
application tells its model first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from flexgen_bench.engine.generation import KeptTokens

# With fewer tokens in common a prompt is computed as a whole: fresh keys are attended without a mask.
LEAST = 32


class KeptStore:
    """At most ``most`` tokens, of ended requests and of those under way that will leave theirs; what was used longest
    ago goes first. Those under way get no more than half, so that many at once do not drive out what is there.

    For one thread.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: list[KeptTokens] = []  # used longest ago first
        self._awaited: Counter[int] = Counter()  # by id: found, and not yet copied to where it is needed
        self._reserved = 0

    @property
    def tokens(self) -> int:
        """How many are kept."""
        return sum(len(entry.tokens) for entry in self._entries)

    def find(self, prompt: Sequence[int]) -> KeptTokens | None:
        """What has most in common with the beginning of a prompt; it stays until ``copied``."""
        best = max(self._entries, key=lambda entry: entry.in_common(prompt), default=None)
        if best is None or best.in_common(prompt) < LEAST:
            return None
        self._entries = [entry for entry in self._entries if entry is not best] + [best]
        self._awaited[id(best)] += 1
        return best

    def copied(self, entry: KeptTokens) -> None:
        """One who has found it needs it no more."""
        self._awaited[id(entry)] -= 1
        self._awaited += Counter()  # without zeros

    def reserve(self, tokens: int) -> bool:
        """Room for what a request will leave, until ``release``; False if there is none."""
        if tokens < LEAST or self._reserved + tokens > self._most // 2:
            return False
        over = self.tokens + self._reserved + tokens - self._most
        going = []
        for entry in self._entries:
            if over <= 0:
                break
            if id(entry) not in self._awaited:
                going.append(entry)
                over -= len(entry.tokens)
        if over > 0:
            return False
        self._entries = [entry for entry in self._entries if not any(entry is one for one in going)]
        self._reserved += tokens
        return True

    def release(self, tokens: int, kept: KeptTokens | None) -> None:
        """Give back what was reserved; kept: what the request has left, which takes the place of its beginnings."""
        self._reserved -= tokens
        if kept is not None:
            self._entries = [entry for entry in self._entries if not self._is_beginning(entry, kept)] + [kept]

    def clear(self) -> None:
        self._entries = []

    def _is_beginning(self, entry: KeptTokens, kept: KeptTokens) -> bool:
        return id(entry) not in self._awaited and kept.tokens[: len(entry.tokens)] == entry.tokens
