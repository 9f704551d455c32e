"""The server as OpenAI's own client sees it: answers are those of ``LLM.generate`` alone, errors are its errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from flexgen_bench import LLM, SamplingParams
from tests.support.server_process import ServerProcess

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/one")


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_completions(client: openai.OpenAI, llm: LLM, temperature: float) -> None:
    prompts, params = ["Once upon", "x" * 50], SamplingParams(max_tokens=9, temperature=temperature, seed=3)
    found = client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=9, temperature=temperature, seed=3)
    alone = [llm.generate([prompt], params)[0] for prompt in prompts]
    assert found.choices[0].text == alone[0].text
    if temperature == 0:
        assert [c.text for c in found.choices] == [a.text for a in alone for _ in range(2)]
    else:
        assert found.choices[0].text != found.choices[1].text
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(len(a.prompt_token_ids) for a in alone)


def test_several_answers_are_those_of_one_prompt_asked_several_times(client: openai.OpenAI, llm: LLM) -> None:
    found = client.completions.create(model="tiny", prompt="abc", n=3, max_tokens=8, temperature=1, seed=9)
    params = SamplingParams(max_tokens=8, temperature=1, seed=9)
    assert [c.text for c in found.choices] == [o.text for o in llm.generate(["abc"] * 3, params)]


def test_chat(client: openai.OpenAI, llm: LLM) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    )
    alone = llm.chat(MESSAGES, SamplingParams(max_tokens=12, logprobs=2))[0]
    assert found.choices[0].message.content == alone.text
    assert found.choices[0].finish_reason == alone.finish_reason
    said = found.choices[0].logprobs
    assert said is not None
    assert said.content is not None
    assert alone.logprobs is not None
    assert [t.logprob for t in said.content] == pytest.approx([t.logprob for t in alone.logprobs], abs=1e-4)
    assert [len(t.top_logprobs) for t in said.content] == [2] * len(alone.token_ids)


def test_streams(client: openai.OpenAI, llm: LLM) -> None:
    """What comes piece by piece is what comes at once; usage is counted at the end."""
    stream = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=20,
        temperature=0,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, reasons, usage = ["", ""], ["", ""], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    alone = llm.chat(MESSAGES, SamplingParams(max_tokens=20))[0]
    assert texts == [alone.text] * 2
    assert reasons == [alone.finish_reason] * 2
    assert usage is not None
    assert usage.completion_tokens == 2 * len(alone.token_ids)
    plain = client.completions.create(model="tiny", prompt="abc", max_tokens=9, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in plain) == llm.generate("abc", SamplingParams(max_tokens=9))[0].text


def test_the_answer_is_part_of_the_next_turn(client: openai.OpenAI, llm: LLM) -> None:
    """As OpenAI's documentation has it: the message itself is appended. Its ``refusal: null`` was refused."""
    first = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4, temperature=0)
    said = first.choices[0].message
    turns: Any = [*MESSAGES, said, {"role": "user", "content": "and"}]
    second = client.chat.completions.create(model="tiny", messages=turns, max_tokens=4, temperature=0)
    turns[-2] = {"role": "assistant", "content": said.content}
    assert second.choices[0].message.content == llm.chat(turns, SamplingParams(max_tokens=4))[0].text


def test_stop_strings(client: openai.OpenAI, llm: LLM) -> None:
    whole = llm.generate("Hello", SamplingParams(max_tokens=40, ignore_eos=True))[0].text
    stop = next(whole[i : i + 2] for i in range(4, len(whole)) if whole.count(whole[i : i + 2]) == 1)
    body: Any = {"ignore_eos": True}
    found = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=40, temperature=0, stop=[stop], extra_body=body
    )
    assert found.choices[0].text == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_prompts_are_scored(client: openai.OpenAI, llm: LLM) -> None:
    """As lm-eval asks: echo and log-probabilities, with one new token or none."""
    for new in (0, 1):
        found = client.completions.create(
            model="tiny", prompt=["abcdef", "xyz"], max_tokens=new, temperature=0, logprobs=1, echo=True
        )
        said = found.choices[0].logprobs
        assert said is not None
        assert said.token_logprobs is not None
        own = llm.score(["a"], ["bcdef"])[0].token_logprobs
        assert said.token_logprobs[1:6] == pytest.approx(own, abs=1e-4)
        assert len(said.token_logprobs) == 6 + new


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
        ({"prompt": "x" * 301}, openai.BadRequestError, "prompt"),
        ({"max_tokens": 201}, openai.BadRequestError, "max_tokens"),
        ({"prompt": [[]]}, openai.BadRequestError, "prompt"),
        ({"prompt": []}, openai.BadRequestError, "prompt"),
        ({"prompt": [1, 999999]}, openai.BadRequestError, "prompt"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"stop": ""}, openai.BadRequestError, "stop"),
        ({"extra_body": {"colour": "red"}}, openai.BadRequestError, "colour"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty"),
        ({"suffix": "x"}, openai.BadRequestError, "suffix"),
        ({"best_of": 3}, openai.BadRequestError, "best_of"),
        ({"logit_bias": {"5": 1}}, openai.BadRequestError, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"logprobs": 99}, openai.BadRequestError, "logprobs"),
        ({"prompt": "x" * 200_000}, openai.APIStatusError, None),
    ],
)
def test_what_is_wrong_is_named(client: openai.OpenAI, change: Any, error: Any, param: str | None) -> None:
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "a", "max_tokens": 2, **change})
    body = caught.value.body
    assert body["message"]
    assert body["type"] == "invalid_request_error"
    if param:
        assert body["param"] == param


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("reasoning_effort", "low"),
        ("top_logprobs", 3),
        ("max_completion_tokens", 3),
        ("presence_penalty", 1),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user", "content": "x", "tool_calls": [{"id": "1"}]}]),
    ],
)
def test_what_is_not_implemented_is_refused(client: openai.OpenAI, field: str, value: Any) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, field: value}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**body)
    assert caught.value.param == field


@pytest.mark.parametrize(
    "values",
    [{"temperature": 1e-300}, {"temperature": 1, "repetition_penalty": 1e-300}, {"temperature": 1, "top_p": 1e-300}],
)
def test_extreme_values_are_nobody_elses_trouble(server: ServerProcess, values: dict[str, float]) -> None:
    """They used to fail the pass, and with it every request that shared it (see ``test_sampling``)."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": 3, **values}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200


def test_log_probabilities_of_a_stream(client: openai.OpenAI) -> None:
    """Offsets go on from chunk to chunk: each used to begin at 0. Usage is null until the last one."""
    asked: Any = {"model": "tiny", "prompt": "abc", "max_tokens": 9, "temperature": 0, "logprobs": 1}
    whole = client.completions.create(**asked).choices[0].logprobs
    assert whole is not None
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": []}
    usages = []
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            for name in found:
                found[name] += getattr(choice.logprobs, name)
    assert found["tokens"] == whole.tokens
    assert found["text_offset"] == whole.text_offset
    assert found["token_logprobs"] == pytest.approx(whole.token_logprobs, abs=1e-5)
    assert usages[-1] is not None
    assert set(usages[:-1]) == {None}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/batches"])
@pytest.mark.parametrize("content", [b"", b"rubbish", b"[]", b"\xff\xfe", b"[" * 90_000, b'{"model": "tiny"}'])
def test_rubbish_gets_an_error_in_the_same_form(server: ServerProcess, path: str, content: bytes) -> None:
    found = httpx.post(server.url + path, content=content, timeout=60)
    assert found.status_code == 400
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_unknown_routes(server: ServerProcess) -> None:
    for found in (httpx.get(f"{server.url}/v1/embeddings"), httpx.get(f"{server.url}/v1/completions")):
        assert found.status_code in (404, 405)
        assert "message" in found.json()["error"]
    assert httpx.get(f"{server.url}/v1/batches?limit=x").json()["error"]["param"] == "limit"


def test_a_template_refuses_a_conversation(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the user begins"):
        client.chat.completions.create(model="tiny", messages=[{"role": "assistant", "content": "a"}])


def test_health_and_metrics(server: ServerProcess) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    before = server.metric("flexgen_answer_tokens_total")
    body = {"model": "tiny", "prompt": "a", "max_tokens": 7, "ignore_eos": True}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    assert server.metric("flexgen_answer_tokens_total") == before + 7
    assert server.metric("flexgen_requests_total") > 0
