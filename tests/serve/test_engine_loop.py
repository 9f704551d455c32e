"""The computing thread when something fails: who waits is told, and what was taken is given back."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from flexgen_bench import LLM
from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.requests.asked import Limits, ParsedRequest, Reader
from flexgen_bench.requests.errors import RequestError
from flexgen_bench.schedule.sequence_groups import Capacity
from flexgen_bench.serve.engine_loop import Answered, EngineLoop


def ended(loop: EngineLoop, parsed: ParsedRequest) -> Answered | RequestError:
    events: queue.Queue[Any] = queue.Queue()
    loop.submit(parsed, events.put)
    while not isinstance(event := events.get(timeout=100), Answered | RequestError):
        pass
    return event


@pytest.mark.parametrize(
    "failure", [DoesNotFit("cpu", 5, 4, "weights", "Take less."), RuntimeError("broken"), MemoryError()]
)
def test_a_job_that_cannot_be_opened_again(llm: LLM, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    """After the log-probabilities of a prompt, which need a job of their own: a request that then found no job used to
    wait until its time was over, and counted as waiting for ever."""
    reader = Reader(llm.tokenizer, llm.shape, ("tiny",), Limits(100, 20))
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 3, "temperature": 0}
    generating = reader.read("/v1/completions", asked)
    scoring = reader.read("/v1/completions", {**asked, "max_tokens": 0, "echo": True, "logprobs": 1})
    with EngineLoop(llm, Capacity(2, 100, 20, 200)) as loop:
        before = ended(loop, generating)
        assert isinstance(ended(loop, scoring), Answered)

        def refuse(capacity: Capacity) -> None:
            raise failure

        monkeypatch.setattr(llm, "open", refuse)
        found = ended(loop, generating)
        assert isinstance(found, RequestError)
        assert found.status == 500
        monkeypatch.undo()
        again = ended(loop, generating)
        assert isinstance(before, Answered)
        assert isinstance(again, Answered)
        assert again.outputs[0].token_ids == before.outputs[0].token_ids
        assert loop.in_system == 0
