"""Files and batches of the server, which survive it; keys; and how it ends."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from flexgen_bench import LLM, SamplingParams
from flexgen_bench.cli import serve
from tests.serve.conftest import LIMITS
from tests.support.server_process import ServerProcess, serving

LINES = 30


def client_of(server: ServerProcess, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)


def lines(count: int = LINES, **more: Any) -> bytes:
    requests = [
        {
            "custom_id": f"line {n}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "tiny", "prompt": f"prompt {n}", "max_tokens": 1 + n % 7, "temperature": 0, **more},
        }
        for n in range(count)
    ]
    requests[3]["body"]["colour"] = "red"  # type: ignore[index]
    return "".join(json.dumps(request) + "\n" for request in requests).encode()


def ended(client: openai.OpenAI, name: str, seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while (batch := client.batches.retrieve(name)).status in ("validating", "in_progress", "finalizing", "cancelling"):
        assert time.monotonic() < end, batch
        time.sleep(0.1)
    return batch


def begun(client: openai.OpenAI, content: bytes) -> str:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    return made.id


def texts(client: openai.OpenAI, file_id: str) -> dict[str, str]:
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    return {answer["custom_id"]: answer["response"]["body"]["choices"][0]["text"] for answer in found}


def test_a_batch(server: ServerProcess, llm: LLM) -> None:
    with client_of(server) as client:
        batch = ended(client, begun(client, lines()))
        assert batch.status == "completed"
        assert (batch.request_counts.completed, batch.request_counts.failed) == (LINES - 1, 1)
        expected = {
            f"line {n}": llm.generate(f"prompt {n}", SamplingParams(max_tokens=1 + n % 7))[0].text
            for n in range(LINES)
            if n != 3
        }
        assert texts(client, batch.output_file_id) == expected
        bad = json.loads(client.files.content(batch.error_file_id).text)
        assert (bad["custom_id"], bad["response"]["body"]["error"]["param"]) == ("line 3", "colour")
        assert batch.id in [b.id for b in client.batches.list()]
        client.files.delete(batch.output_file_id)
        with pytest.raises(openai.NotFoundError):
            client.files.content(batch.output_file_id)


def answered(path: Path) -> int:
    """Whole lines of the file that a batch under way is written to."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def test_a_batch_survives_a_kill_and_a_restart(model: Path, llm: LLM, tmp_path: Path) -> None:
    """Killed twice, at moments when some of it is answered; the server that comes next goes on."""
    content, name = lines(150, ignore_eos=True), ""
    for number in (signal.SIGKILL, signal.SIGINT, None):
        with serving(model, tmp_path / "state", *LIMITS) as server, client_of(server) as client:
            name = name or begun(client, content)
            if number is None:
                batch = ended(client, name)
                found = texts(client, batch.output_file_id)
                break
            answers = tmp_path / "state" / "batches" / f"{name}.answers.jsonl"
            before, end = answered(answers), time.monotonic() + 200
            while answered(answers) < min(before + 20, 140):
                # On a busy machine it may have ended before anybody looked.
                if client.batches.retrieve(name).status == "completed":
                    break
                assert time.monotonic() < end
                time.sleep(0.005)
            assert server.stop(number) in (0, -signal.SIGKILL), server.log.read_text()
    assert batch.status == "completed"
    assert batch.request_counts.total == 150
    params = [SamplingParams(max_tokens=1 + n % 7, ignore_eos=True) for n in range(150)]
    alone = llm.generate([f"prompt {n}" for n in range(150)], params)
    assert found == {f"line {n}": alone[n].text for n in range(150) if n != 3}


def test_a_batch_is_cancelled(server: ServerProcess) -> None:
    with client_of(server) as client:
        name = begun(client, lines(400, max_tokens=200, ignore_eos=True))
        client.batches.cancel(name)
        batch = ended(client, name)
        assert batch.status == "cancelled"
        assert batch.request_counts.completed < 400


def test_what_is_no_batch_is_named(server: ServerProcess) -> None:
    with client_of(server) as client:
        with pytest.raises(openai.NotFoundError):
            client.batches.create(input_file_id="../../etc", endpoint="/v1/completions", completion_window="24h")
        with pytest.raises(openai.BadRequestError, match="purpose"):
            client.files.create(file=("in.jsonl", b"x"), purpose="fine-tune")
        file = client.files.create(file=("in.jsonl", b"a,b\n" * 30), purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        batch = ended(client, made.id)
        assert batch.status == "failed"
        assert "JSONL" in batch.errors.data[0].message
        with pytest.raises(openai.BadRequestError, match="endpoint"):
            client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")


def test_keys(model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsecret-1\n\nsecret-2\n")
    with serving(model, tmp_path / "state", *LIMITS, "--keys", str(keys)) as server:
        assert [m.id for m in client_of(server, "secret-2").models.list()] == ["tiny"]
        for key in ("secret-3", "ours", "secret-2\u00e9".encode().decode("latin-1")):
            found = httpx.get(f"{server.url}/v1/models", headers={b"authorization": b"Bearer " + key.encode("latin-1")})
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_state_belongs_to_one_server(server: ServerProcess, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"model={model}", "gpu=cpu", f"cache_dir={model.parent / 'cache'}", "--state", str(server.state)]
    assert serve.main([*given, "--port", "0"]) == 2
    assert "Another one runs on it" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_within_the_stated_time(model: Path, tmp_path: Path, number: int) -> None:
    """With an answer under way that would take far longer."""
    limits = ("sequences=2", "prompt_tokens=100", "answer_tokens=400", "stop_s=1")
    with serving(model, tmp_path / "state", *limits) as server:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=200) as response:
            next(response.iter_lines())
            assert server.stop(number) in (0, -number)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--host", "0.0.0.0"], "--host"),
        (["--host", "example.org"], "--host"),
        (["--port", "99999"], "--port"),
        (["sequences=0"], "sequences"),
        (["request_s=soon"], "request_s"),
        (["--keys", "nowhere"], "--keys"),
        (["prompt_tokens=100000"], "prompt_tokens"),
        (["colour=red"], "colour"),
    ],
)
def test_what_cannot_be_is_named(
    words: list[str], named: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"model={model}", "gpu=cpu", f"cache_dir={model.parent / 'cache'}", "--state", str(tmp_path)]
    assert serve.main([*given, *words]) == 2
    assert named in capsys.readouterr().err
