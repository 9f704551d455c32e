"""Policies searched for in processes side by side, with a line now and then about how far they are."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableSequence, Sequence
from concurrent.futures import BrokenExecutor, Future, wait
from contextlib import ExitStack
from multiprocessing.sharedctypes import RawArray
from types import TracebackType

from flexgen_bench.core.processes import cores, process_pool, shared_memory
from flexgen_bench.planner.ask import Ask
from flexgen_bench.planner.progress import listening
from flexgen_bench.store.kept_predictions import Answer

_EVERY_S = 4.0


class Searches:
    """What is to be searched for, each with its name. A context: entering it begins all that a process can be had for.

    tell: gets a line when a search begins, and every few seconds of waiting.
    """

    def __init__(self, asks: Sequence[tuple[Ask, str]], tell: Callable[[str], None]) -> None:
        self._asks, self._tell = asks, tell
        self._begun_s = self._told_s = time.monotonic()
        self._futures: list[Future[Answer]] = []
        self._shares: MutableSequence[float] = [0.0] * len(asks)
        self._stack = ExitStack()

    def __enter__(self) -> Searches:
        count = len(self._asks)
        workers = min(cores(), count)
        if count:
            names = "; ".join(name for _, name in self._asks)
            word = "a policy" if count == 1 else f"{count} policies in {workers} processes"
            self._tell(f"searching for {word}: {names}")
        if workers > 1:
            self._shares = RawArray("d", count)
            pool = self._stack.enter_context(process_pool(workers, self._shares))
            self._futures = [pool.submit(_search, ask, number) for number, (ask, _) in enumerate(self._asks)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def answer(self, number: int) -> Answer:
        """What the search has found, once it has. Raises what a mistake in the predictor raises. One whose process has
        died (as it may where memory is short) is done again here."""
        if self._futures:
            future = self._futures[number]
            try:
                while not wait([future], timeout=1).done:
                    self._progress()
                return future.result()
            except BrokenExecutor as error:
                self._tell(f"a process that searched for a policy has died ({error}); searching here")

        def heard(share: float) -> None:
            self._shares[number] = share
            self._progress()

        with listening(heard):
            return self._asks[number][0].answer()

    def _progress(self) -> None:
        now = time.monotonic()
        if now < self._told_s + _EVERY_S:
            return
        self._told_s = now
        share = sum(self._shares) / len(self._asks)
        self._tell(f"  {share:.0%} of the search done in {now - self._begun_s:.0f} s")


def _search(ask: Ask, number: int) -> Answer:
    """In a process of the pool."""
    shares = shared_memory()

    def heard(share: float) -> None:
        shares[number] = share

    with listening(heard):
        answer = ask.answer()
    shares[number] = 1.0
    return answer
