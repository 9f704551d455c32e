"""``flexgen-bench batch``: every line gets its answer, as if it were alone; what is bad is named and nothing is
lost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench import LLM, SamplingParams
from flexgen_bench.cli import batch
from flexgen_bench.schedule.prefix_tree import ScoreRequest
from tests.support.tiny_text_models import CHAT_TEMPLATE, text_model

PROMPTS = ["Once upon a time", "x", "The quick brown fox jumps over it", "äöü 漢字", "y" * 60]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("batch") / "ckpt", "llama", chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, cache_dir=model.parent / "cache", threads=1, gpu="cpu") as made:
        yield made


def run(model: Path, *arguments: object, status: int = 0) -> None:
    words = [f"model={model}", "name=m", "gpu=cpu", "threads=1", f"cache_dir={model.parent / 'cache'}"]
    assert batch.main([*map(str, arguments), *words]) == status


def written(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def openai_line(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m", **body}}


def texts(answer: dict[str, Any]) -> list[str]:
    return [c["text"] for c in answer["response"]["body"]["choices"]]


def test_answers_are_those_of_each_request_alone(model: Path, llm: LLM, tmp_path: Path) -> None:
    """Greedy and sampled, one answer or several, mixed in one window; in the order of the input."""
    lines, expected = [], []
    for number in range(40):
        prompt, new, n = PROMPTS[number % 5], 1 + number % 7, 1 + number % 3
        temperature = 0.9 * (number % 2)
        body = {"max_tokens": new, "n": n, "temperature": temperature, "seed": number, "ignore_eos": True}
        lines.append(openai_line(f"line {number}", prompt=prompt, **body))
        params = SamplingParams(max_tokens=new, temperature=temperature, seed=number, ignore_eos=True)
        expected.append([output.text for output in llm.generate([prompt] * n, params)])
    out = tmp_path / "out.jsonl"
    run(model, written(tmp_path / "in.jsonl", lines), "-o", out, "--window", 12)
    all_answers = answers(out)
    assert [a["custom_id"] for a in all_answers] == [f"line {n}" for n in range(40)]
    assert [texts(a) for a in all_answers] == expected
    assert all(a["error"] is None and a["response"]["status_code"] == 200 for a in all_answers)


def test_conversations_go_through_the_template(model: Path, llm: LLM, tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    lines = [openai_line("a", "/v1/chat/completions", messages=messages, max_tokens=6, temperature=0)]
    out = tmp_path / "out.jsonl"
    run(model, written(tmp_path / "in.jsonl", lines), "-o", out)
    params = SamplingParams(max_tokens=6)
    expected = llm.generate("system: Be brief.\nuser: Hi\nassistant: ", params)[0]
    message = answers(out)[0]["response"]["body"]["choices"][0]["message"]
    assert (message["role"], message["content"]) == ("assistant", expected.text)
    assert llm.chat(messages, params)[0].text == expected.text


def test_plain_forms_are_greedy(model: Path, llm: LLM, tmp_path: Path) -> None:
    """Bare prompts in JSON, lines of text, a column of parquet: SamplingParams' defaults, and words of the command."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    written(tmp_path / "a.jsonl", [{"prompt": "one"}, "", {"prompt": [5, 6, 7], "max_tokens": 3}])
    written(tmp_path / "b.txt", ["two", "", "three"])
    write_table(pa.table({"id": [1, 2], "q": ["four", "five"]}), tmp_path / "c.parquet")
    out = tmp_path / "out.jsonl"
    files = [tmp_path / name for name in ("a.jsonl", "b.txt", "c.parquet")]
    run(model, *files, "-o", out, "--column", "q", "max_tokens=5")
    prompts = ["one", [5, 6, 7], "two", "three", "four", "five"]
    expected = [llm.generate([p], SamplingParams(max_tokens=3 if p == [5, 6, 7] else 5))[0].text for p in prompts]
    assert [texts(a)[0] for a in answers(out)] == expected
    assert [int(a["id"].rpartition("_")[2]) for a in answers(out)] == [0, 2, 3, 5, 6, 7]


BAD = [
    ("rubbish", None),
    ("[1, 2]", None),
    ('{"custom_id": "x", "url": "/v1/embeddings", "body": {}}', "url"),
    (openai_line("first", prompt="again"), "custom_id"),
    ({"custom_id": 7, "prompt": "x"}, "custom_id"),
    ({"prompt": "x", "messages": []}, "body"),
    (openai_line("b1"), "prompt"),
    (openai_line("b2", prompt="x", max_tokens="5"), "max_tokens"),
    (openai_line("b3", prompt="x", max_tokens=-1), "max_tokens"),
    (openai_line("b4", prompt="x" * 500), "prompt"),
    (openai_line("b5", prompt="x", temperature=3), "temperature"),
    (openai_line("b6", prompt="x", presence_penalty=0.5), None),
    (openai_line("b7", prompt="x", stream=True), "stream"),
    (openai_line("b8", prompt="x", colour="red"), "colour"),
    (openai_line("b9", "/v1/chat/completions", messages="hello"), "messages"),
    (openai_line("b10", "/v1/chat/completions", messages=[{"role": "user", "content": 5}]), "messages"),
    (openai_line("b11", "/v1/chat/completions", messages=[{"role": "assistant", "content": "a"}]), "messages"),
    (openai_line("b12", prompt=[1, 2, 10**6]), "prompt"),
    (openai_line("b13", prompt="\ud800"), "prompt"),
    (
        {"custom_id": "b14", "method": "POST", "url": "/v1/completions", "body": {"model": "gpt-9", "prompt": "x"}},
        "model",
    ),
    ("[" * 100_000, None),
]


def test_a_bad_line_is_a_line_of_its_own(model: Path, tmp_path: Path) -> None:
    lines = [
        openai_line("first", prompt="good", temperature=0),
        *(line for line, _ in BAD),
        openai_line("last", prompt="good", temperature=0),
    ]
    (tmp_path / "in.jsonl").write_bytes(written(tmp_path / "x", lines).read_bytes() + b'{"prompt": "\xff"}\n')
    out = tmp_path / "out.jsonl"
    run(model, tmp_path / "in.jsonl", "-o", out)
    all_answers = answers(out)
    assert [a["response"]["status_code"] == 200 for a in all_answers] == [True, *[False] * len(BAD), True, False]
    for answer, (line, param) in zip(all_answers[1:-2], BAD, strict=True):
        said = answer["response"]["body"]["error"]
        assert said["message"] == answer["error"]["message"], line
        assert said["message"], line
        if param is not None:
            assert said["param"] == param, line
    assert texts(all_answers[0]) == texts(all_answers[-2])


def test_log_probabilities(model: Path, llm: LLM, tmp_path: Path) -> None:
    """Of new tokens from the run that makes them, of the prompt's by scoring; those of the library's own scores."""
    lines = [
        openai_line("new", prompt="abc", max_tokens=4, temperature=0, logprobs=2),
        openai_line("echo", prompt="abc", max_tokens=2, temperature=0, logprobs=1, echo=True),
        openai_line("score", prompt=["abcdef", "abc"], max_tokens=0, logprobs=0, echo=True),
        openai_line(
            "chat", "/v1/chat/completions", messages=[{"role": "user", "content": "a"}], max_tokens=2, logprobs=True
        ),
    ]
    out = tmp_path / "out.jsonl"
    run(model, written(tmp_path / "in.jsonl", lines), "-o", out)
    new, echo, score, chat = (a["response"]["body"]["choices"] for a in answers(out))
    params = SamplingParams(max_tokens=4, logprobs=2)
    alone = llm.generate("abc", params)[0]
    assert alone.logprobs is not None
    own = llm.score_tokens([ScoreRequest([*alone.prompt_token_ids, *alone.token_ids], len(alone.prompt_token_ids))])[0]
    assert new[0]["logprobs"]["token_logprobs"] == pytest.approx(own.token_logprobs, abs=1e-4)
    assert new[0]["logprobs"]["token_logprobs"] == pytest.approx([p.logprob for p in alone.logprobs], abs=1e-5)
    assert all(len(top) in (2, 3) for top in new[0]["logprobs"]["top_logprobs"])
    assert echo[0]["text"] == "abc" + llm.generate("abc", SamplingParams(max_tokens=2))[0].text
    assert echo[0]["logprobs"]["token_logprobs"][0] is None
    assert len(echo[0]["logprobs"]["tokens"]) == 5
    assert [c["text"] for c in score] == ["abcdef", "abc"]
    whole = llm.score(["a"], ["bcdef"])[0]
    assert score[0]["logprobs"]["token_logprobs"][1:] == pytest.approx(whole.token_logprobs, abs=1e-4)
    assert echo[0]["logprobs"]["token_logprobs"][1:3] == pytest.approx(whole.token_logprobs[:2], abs=1e-4)
    assert len(chat[0]["logprobs"]["content"]) == 2


def test_shards_together_are_the_whole(model: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "in.txt", [f"prompt {n}" for n in range(10)])
    run(model, source, "-o", tmp_path / "all.jsonl")
    shard_answers = []
    for i in (1, 2, 3):
        run(model, source, "-o", tmp_path / f"{i}.jsonl", "--shard", f"{i}/3")
        shard_answers += answers(tmp_path / f"{i}.jsonl")
    shard_answers.sort(key=lambda a: a["id"])
    assert [texts(a) for a in shard_answers] == [texts(a) for a in answers(tmp_path / "all.jsonl")]


def test_the_plan_is_said_and_nothing_done(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(model, written(tmp_path / "in.txt", ["a"] * 5), "-o", tmp_path / "out.jsonl", "--plan")
    said = capsys.readouterr().err
    assert "5 requests: about 5 prompt tokens, at most 80 new ones" in said
    assert "memory: cpu" in said
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"input": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"input": "in.csv"}, "in.csv"),
        ({"words": ["max_token=5"]}, "max_token"),
        ({"words": ["--shard", "4/3"]}, "--shard"),
        ({"words": ["--column", "q"]}, "--column"),
        ({"words": ["--window", "0"]}, "--window"),
        ({"words": ["memory=lots"]}, "memory"),
        ({"words": ["memory=1MiB"]}, "within the capacity of"),  # Python alone takes more: nothing is left
        ({"words": ["temperature=hot"]}, "temperature"),
        ({"words": ["answer_tokens=0"]}, "answer_tokens"),
        ({"output": "in.jsonl"}, "--output"),
        ({"output": "missing/out.jsonl"}, "--output"),
        ({"text": "a,b\n" * 30}, "JSONL"),
        ({"text": "\n"}, "requests in it"),
    ],
)
def test_what_cannot_be_is_named(
    change: dict[str, Any], named: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text(change.get("text", '{"prompt": "a"}\n'))
    (tmp_path / "in.csv").write_text("a")
    source, out = tmp_path / change.get("input", "in.jsonl"), tmp_path / change.get("output", "out.jsonl")
    run(model, source, "-o", out, *change.get("words", []), status=2)
    assert named in capsys.readouterr().err
    assert (tmp_path / "in.jsonl").read_text() == change.get("text", '{"prompt": "a"}\n')
