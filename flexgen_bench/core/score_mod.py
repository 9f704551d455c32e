"""What happens to attention scores between the scaled dot product and the softmax."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

# Of prompts, so many scores that are changed before the softmax are held at once, over all heads: 16 MiB in float32.
SCORES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class ScoreMod:
    """One layer's changes of its scores, in the order in which they are applied. Distance: of a key behind its query,
    in tokens.

    soft_cap: c * tanh(score / c) (Gemma 2). slopes: of each query head, times the distance is taken off (ALiBi, Press
    et al. 2022, equation 1); empty: none. window: a query sees itself and the ``window - 1`` tokens before it (Beltagy
    et al. 2020); None: all.
    """

    window: int | None = None
    soft_cap: float | None = None
    slopes: tuple[float, ...] = ()

    @property
    def is_none(self) -> bool:
        return self.window is None and self.soft_cap is None and not self.slopes

    @cached_property
    def unwindowed(self) -> ScoreMod:
        """The same over keys that are all in the window."""
        return replace(self, window=None)

    def over(self, tokens: int) -> ScoreMod:
        """The same for sequences of at most so many tokens: a window that none of them leaves is none."""
        if self.window is None or tokens > self.window:
            return self
        return replace(self, window=None)

    def seen(self, tokens: int) -> int:
        """How many of ``tokens`` keys the last query sees."""
        return tokens if self.window is None else min(tokens, self.window)


NO_MOD = ScoreMod()


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """2^(-8/n), 2^(-16/n), ... for n heads, a power of two; for other counts those of the power below, and between them
    every other one of the power above (Press et al. 2022, section 3, and the code they published)."""
    whole = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * i / whole) for i in range(1, whole + 1)]
    between = [2.0 ** (-4 * i / whole) for i in range(1, 2 * whole, 2)]
    return tuple((slopes + between)[:heads])
