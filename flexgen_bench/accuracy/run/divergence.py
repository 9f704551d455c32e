"""How far a mode's next-token distributions are from the uncompressed ones, on plain text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flexgen_bench.accuracy.run.token_loss import compare, first_scored, joined, token_loss
from flexgen_bench.core.accuracy import Divergence
from flexgen_bench.core.token_loss import TokenLoss

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


def keep(model: GivesLogprobs, texts: Sequence[Sequence[int]], folder: Path, first: int = 0) -> None:
    """Write a model's distributions into ``folder``, one file for each sequence: two models need not be in memory at
    once. first: of each sequence, those after this many tokens more than one."""
    import numpy as np

    folder.mkdir(exist_ok=True)
    for number, logprobs in enumerate(model.logprobs(texts)):
        np.save(folder / f"{number}.npy", logprobs[first:].float().cpu().numpy())


def divergence(name: str, model: GivesLogprobs, texts: Sequence[Sequence[int]], folder: Path) -> Divergence:
    """Of ``model`` from the one whose distributions ``keep`` has written into ``folder``."""
    import torch

    total: dict[str, Any] = {"positions": 0, "kl": 0.0, "agree": 0, "nll_exact": 0.0, "nll": 0.0}
    for number, (text, logprobs) in enumerate(zip(texts, model.logprobs(texts), strict=True)):
        exact, mine = _both(folder, number, logprobs)
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


def loss_of(name: str, model: GivesLogprobs, texts: Sequence[Sequence[int]], folder: Path) -> TokenLoss | None:
    """Of ``model``, token by token, beside the one whose distributions in the second half of each of these chunks of
    the text ``name`` ``keep`` has written into ``folder``. None for too little text."""
    import torch

    pieces = []
    for number, (text, logprobs) in enumerate(zip(texts, model.logprobs(texts), strict=True)):
        first = first_scored(len(text))
        exact, mine = _both(folder, number, logprobs[first:])
        pieces.append(compare(exact, mine, torch.tensor(list(text[first + 1 :]))))
    return token_loss(joined(pieces), len(texts[0]), name) if pieces else None


def _both(folder: Path, number: int, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """What ``keep`` has written of a sequence, and the same of another model, float32."""
    import numpy as np
    import torch

    exact, mine = torch.from_numpy(np.load(folder / f"{number}.npy")), logprobs.float().cpu()
    if exact.shape != mine.shape:
        raise ValueError(f"distributions {tuple(mine.shape)} beside {tuple(exact.shape)}")
    return exact, mine
