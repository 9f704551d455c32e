"""The wire between ranks: what is sent arrives, nothing waits for who receives it, and every wait can be ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from flexgen_bench.core.errors import RankLost
from flexgen_bench.engine.local_wire import local_wires
from flexgen_bench.engine.wire import Wire
from flexgen_bench.ranks import gloo_wire
from flexgen_bench.ranks.gloo_wire import GlooWire


def wires(ranks: int) -> list[GlooWire]:
    """Of one process: gloo does not mind."""
    store = HashStore()
    with ThreadPoolExecutor(ranks) as pool:
        made = [pool.submit(GlooWire, store, "test", rank, ranks, "127.0.0.1") for rank in range(ranks)]
        return [one.result(60) for one in made]


def test_hidden_states_go_to_the_next_rank_and_tokens_to_all() -> None:
    first, middle, last = wires(3)
    rows = torch.randn(5, 7).to(torch.bfloat16)
    first.send_hidden(0, rows)
    into = torch.empty_like(rows)
    middle.recv_hidden(0, into)
    assert torch.equal(into, rows)
    strided = torch.empty(5, 14, dtype=torch.bfloat16)[:, ::2]
    middle.send_hidden(3, rows[:, :].T.contiguous().T)
    last.recv_hidden(3, strided)
    assert torch.equal(strided, rows)
    last.send_tokens(0, b"chosen")
    assert first.recv_tokens(0) == middle.recv_tokens(0) == b"chosen"
    last.send_tokens(1, b"x" * 100_000)
    assert first.recv_tokens(1) == b"x" * 100_000


def test_nothing_waits_for_who_receives_it_and_order_is_by_number() -> None:
    """All is sent before anything is received; micro-batches are asked for in another order; of one number the first
    that was sent comes first."""
    first, last = wires(2)
    for turn in range(3):
        for number in range(4):
            first.send_hidden(number, torch.full((64, 512), float(10 * turn + number)))
            last.send_tokens(number, b"%d" % (10 * turn + number))
    into = torch.empty(64, 512)
    for turn in range(3):
        for number in (2, 0, 3, 1):
            last.recv_hidden(number, into)
            assert set(into.view(-1).tolist()) == {10.0 * turn + number}
            assert first.recv_tokens(number) == b"%d" % (10 * turn + number)


def failing(call: Callable[[], Any]) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


def test_an_abort_ends_every_wait_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo_wire, "_NEWS_S", 0.2)
    first, last = wires(2)
    waiting = [failing(lambda: last.recv_hidden(0, torch.empty(2, 2))), failing(lambda: first.recv_tokens(5))]
    reason = RankLost(1, "killed")
    first.abort(reason)
    first.abort(RuntimeError("a later one"))
    for thread, _ in waiting:
        thread.join(30)
        assert not thread.is_alive()
    assert waiting[1][1] == [reason]
    assert isinstance(waiting[0][1][0], RankLost)  # the other side only sees that the connection has ended
    for late in (lambda: first.recv_tokens(0), lambda: first.send_hidden(0, torch.zeros(1, 1))):
        with pytest.raises(RankLost, match="rank 1 is lost: killed"):
            late()


@pytest.mark.parametrize("make", [wires, local_wires])
def test_no_more_is_under_way_than_there_is_room_for(
    make: Callable[[int], Sequence[Wire]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan counts one pass of hidden states on their way. Nothing held a rank to that: one that was ahead of the
    next by several waves kept them all in memory."""
    monkeypatch.setattr(gloo_wire, "_NEWS_S", 0.2)
    first, last = make(2)
    rows = torch.zeros(2, 8)
    first.begin(2 * rows.nbytes)
    first.send_hidden(0, torch.zeros(20, 8))  # more than there is room for goes alone
    thread, raised = failing(lambda: [first.send_hidden(number, rows) for number in (1, 2, 3)])
    thread.join(0.2)
    assert thread.is_alive()
    last.recv_hidden(0, torch.empty(20, 8))
    thread.join(0.2)
    assert thread.is_alive()
    last.recv_hidden(1, torch.empty(2, 8))
    thread.join(30)
    assert not thread.is_alive()
    assert not raised
    thread, raised = failing(lambda: first.send_hidden(4, rows))
    thread.join(0.2)
    assert thread.is_alive()
    reason = RankLost(1, "killed")
    first.abort(reason)
    thread.join(30)
    assert raised == [reason]
