"""Which prefixes a server keeps, and that answers which go on from them are those of a run of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from flexgen_bench import LLM, SamplingParams
from flexgen_bench.engine.generation import KeptTokens
from flexgen_bench.serve.kept_store import LEAST, KeptStore
from tests.support.server_process import ServerProcess

SYSTEM = {"role": "system", "content": "You are terse, and you never speak of the weather."}


def kept(*tokens: int) -> KeptTokens:
    return KeptTokens(tokens, ())


def grown(store: KeptStore, *tokens: int) -> bool:
    """A request that leaves exactly these tokens; whether there was room."""
    if not store.reserve(len(tokens)):
        return False
    store.release(len(tokens), kept(*tokens))
    return True


def test_the_longest_common_beginning_is_found() -> None:
    store = KeptStore(1000)
    short, long = range(LEAST), [*range(LEAST + 10), 7]
    grown(store, *short, 1, 2)
    grown(store, *long)
    found = store.find([*range(LEAST + 5), 99])
    assert found is not None
    assert found.tokens == tuple(long)
    assert store.find([*range(LEAST - 1), 99, 98]) is None  # too little to be worth a mask
    assert store.find(range(LEAST)) is None  # the last token is always computed
    assert store.find([]) is None


def test_a_conversation_takes_the_place_of_its_beginning() -> None:
    store = KeptStore(1000)
    for turns in (40, 80, 120):
        grown(store, *range(turns))
    assert store.tokens == 120
    grown(store, *range(60), 5)
    assert store.tokens == 120 + 61


def test_what_was_used_longest_ago_goes_first() -> None:
    store = KeptStore(300)
    for first in (1000, 2000, 3000):
        grown(store, *range(first, first + 100))
    assert store.find(range(1000, 1200)) is not None
    grown(store, *range(4000, 4050))
    assert store.find(range(2000, 2200)) is None
    assert store.tokens == 250


def test_what_somebody_waits_for_stays() -> None:
    store = KeptStore(200)
    grown(store, *range(100))
    grown(store, *range(1000, 1100))
    found = store.find(range(150))
    again = store.find(range(150))
    assert found is again is not None
    assert grown(store, *range(2000, 2100))
    assert not store.reserve(100 + 1)  # more than half, for those under way
    assert store.find(range(1000, 1200)) is None
    assert store.find(range(150)) is found
    for _ in range(3):
        store.copied(found)
    assert grown(store, *range(3000, 3100))
    assert grown(store, *range(4000, 4100))
    assert store.find(range(150)) is None


def test_no_history_goes_beyond_the_bound() -> None:
    """Random requests: what is kept and what is promised together are never more than was planned."""
    for seed in range(30):
        draw = random.Random(seed)
        most = draw.choice([0, 50, 200, 1000])
        store, promised, awaited = KeptStore(most), list[int](), list[KeptTokens]()
        for _ in range(200):
            base = draw.choice([0, 0, 5000])
            prompt = [*range(base, base + draw.randrange(1, 150)), draw.randrange(100)]
            found = store.find(prompt)
            if found is not None:
                awaited.append(found)
            if store.reserve(len(prompt) + 10):
                promised.append(len(prompt) + 10)
            if promised and draw.random() < 0.6:
                size = promised.pop(draw.randrange(len(promised)))
                store.release(size, kept(*prompt[:size]) if draw.random() < 0.8 else None)
            if awaited and draw.random() < 0.7:
                store.copied(awaited.pop())
            assert store.tokens + sum(promised) <= most


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def test_turns_and_instructions_are_not_computed_again(client: openai.OpenAI, llm: LLM, server: ServerProcess) -> None:
    params, messages = SamplingParams(max_tokens=8, ignore_eos=True), [SYSTEM, {"role": "user", "content": "Hi"}]
    before = server.metric("flexgen_prompt_tokens_kept_total")
    cached, asked = [], []
    conversations: list[Any] = []
    for text in ("And you?", "Why?", None):
        body: Any = {"ignore_eos": True}
        found = client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=8,
            temperature=0,
            extra_body=body,  # type: ignore[arg-type]
        )
        assert found.usage is not None
        assert found.usage.prompt_tokens_details is not None
        cached.append(found.usage.prompt_tokens_details.cached_tokens or 0)
        asked.append(found.usage.prompt_tokens)
        answer = found.choices[0].message.content or ""
        conversations.append((messages, answer))
        messages = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": str(text)}]
    # Another user, with the same instructions.
    other = [SYSTEM, {"role": "user", "content": "Who?"}]
    found = client.chat.completions.create(
        model="tiny", messages=other, max_tokens=8, temperature=0, n=2, extra_body={"ignore_eos": True}
    )
    conversations += [(other, choice.message.content) for choice in found.choices]
    assert found.usage is not None
    assert found.usage.prompt_tokens_details is not None
    shared = found.usage.prompt_tokens_details.cached_tokens or 0
    assert shared > len(SYSTEM["content"])
    assert cached[1] >= asked[0] - 1
    assert cached[2] >= asked[1] - 1
    assert server.metric("flexgen_prompt_tokens_kept_total") == before + sum(cached) + shared
    for messages, answer in conversations:
        assert llm.chat(messages, params)[0].text == answer
