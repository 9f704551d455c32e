"""How far a mode's next-token distributions are from the uncompressed ones, on plain text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flexgen_bench.core.accuracy import Divergence

if TYPE_CHECKING:
    from torch import Tensor

# A window is one sequence: long enough for the cache to matter, and its distributions (49,152 tokens: 50 MB) fit in
# memory.
WINDOW = 256


class GivesLogprobs(Protocol):
    """An lm-eval model that tells whole distributions."""

    def logprobs(self, token_ids: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Of each sequence of T tokens the log-probabilities (T - 1, V) float32 after its first, second, ... token."""


def windows(tokens: Sequence[int], count: int, length: int = WINDOW) -> list[list[int]]:
    """The first ``count`` tokens cut into windows of ``length``; a last one of a single token predicts nothing."""
    pieces = [list(tokens[i : i + length]) for i in range(0, min(count, len(tokens)), length)]
    pieces[-1:] = [w for w in pieces[-1:] if len(w) > 1]
    return pieces


def keep(model: GivesLogprobs, texts: Sequence[Sequence[int]], folder: Path) -> None:
    """Write a model's distributions into ``folder``, one file for each sequence: two models need not be in memory at
    once."""
    import numpy as np

    for number, logprobs in enumerate(model.logprobs(texts)):
        np.save(folder / f"{number}.npy", logprobs.float().cpu().numpy())


def divergence(name: str, model: GivesLogprobs, texts: Sequence[Sequence[int]], folder: Path) -> Divergence:
    """Of ``model`` from the one whose distributions ``keep`` has written into ``folder``."""
    import numpy as np
    import torch

    total: dict[str, Any] = {"positions": 0, "kl": 0.0, "agree": 0, "nll_exact": 0.0, "nll": 0.0}
    for number, (text, logprobs) in enumerate(zip(texts, model.logprobs(texts), strict=True)):
        exact = torch.from_numpy(np.load(folder / f"{number}.npy"))
        mine = logprobs.float().cpu()
        if exact.shape != mine.shape:
            raise ValueError(f"distributions {tuple(mine.shape)} beside {tuple(exact.shape)}")
        nexts = torch.tensor(list(itertools.islice(text, 1, None)))[:, None]
        # Where both say -inf the difference is none.
        terms = torch.where(exact > -torch.inf, exact.exp() * (exact - mine), torch.zeros(()))
        total["positions"] += len(nexts)
        total["kl"] += float(terms.double().sum())
        total["agree"] += int((exact.argmax(-1) == mine.argmax(-1)).sum())
        total["nll_exact"] -= float(exact.gather(1, nexts).double().sum())
        total["nll"] -= float(mine.gather(1, nexts).double().sum())
    total["kl"] = max(total["kl"] / max(total["positions"], 1), 0.0)
    return Divergence(text=name, **total)
