"""Many clients at once, some of which go away or send rubbish: nothing of it reaches the others, and everything that
was taken is given back."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from flexgen_bench import LLM, SamplingParams
from tests.support.server_process import ServerProcess, serving

URL = "/v1/completions"
CLIENTS = 200


def body(number: int, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": f"prompt {number % 25}", "max_tokens": 1 + number % 12, "temperature": 0, **more}


async def _good(client: httpx.AsyncClient, number: int) -> str:
    found = await client.post(URL, json=body(number))
    assert found.status_code == 200, found.text
    return str(found.json()["choices"][0]["text"])


async def _streamed(client: httpx.AsyncClient, number: int) -> str:
    text = ""
    async with client.stream("POST", URL, json=body(number, stream=True)) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                import json

                text += json.loads(line[6:])["choices"][0]["text"]
    return text


async def _goes_away(client: httpx.AsyncClient, number: int, draw: random.Random) -> None:
    long = body(number, max_tokens=200, ignore_eos=True, stream=bool(number % 2))
    if number % 2:
        async with client.stream("POST", URL, json=long) as response:
            async for _ in response.aiter_lines():
                break
        return
    with pytest.raises((httpx.TimeoutException, asyncio.TimeoutError)):
        await asyncio.wait_for(client.post(URL, json=long), 0.05 + draw.random() * 0.3)


async def _rubbish(client: httpx.AsyncClient, number: int) -> None:
    content = [b"rubbish", b'{"model": "tiny", "prompt": 5}', b"\x00" * 1000, b"x" * 150_000][number % 4]
    found = await client.post(URL, content=content)
    assert found.status_code in (400, 413)


async def _round(url: str, seed: int) -> dict[int, str]:
    """200 clients at once; the texts of those who wait for theirs."""
    draw, good = random.Random(seed), {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def one(number: int) -> None:
            await asyncio.sleep(draw.random() * 0.5)
            kind = number % 5
            if kind == 3:
                await _goes_away(client, number, draw)
            elif kind == 4:
                await _rubbish(client, number)
            else:
                good[number] = await (_streamed if kind == 2 else _good)(client, number)

        await asyncio.gather(*(one(number) for number in range(CLIENTS)))
    return good


def settled(server: ServerProcess) -> None:
    """Those who went away are noticed with the next pass."""
    end = time.monotonic() + 60
    while server.metric("flexgen_sequences") or server.metric("flexgen_kv_slots_in_use"):
        assert time.monotonic() < end, "KV space is held by nobody"
        time.sleep(0.1)


def test_two_hundred_clients(server: ServerProcess, llm: LLM) -> None:
    alone = {
        number: llm.generate(body(number)["prompt"], SamplingParams(max_tokens=body(number)["max_tokens"]))[0].text
        for number in range(CLIENTS)
        if number % 5 < 3
    }
    memory = []
    for seed in range(3):
        assert asyncio.run(_round(server.url, seed)) == alone
        settled(server)
        memory.append(server.memory())
    assert memory[2] < memory[1] + 16 * 2**20, "memory is flat once everything has been used"


def test_a_full_queue_says_when_to_come_back(model: Path, tmp_path: Path) -> None:
    limits = ("sequences=1", "queue=2", "prompt_tokens=100", "answer_tokens=400")
    with serving(model, tmp_path / "state", *limits) as server:

        async def all_at_once() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=200) as client:
                return await asyncio.gather(
                    *(client.post(URL, json=body(0, max_tokens=300, ignore_eos=True)) for _ in range(12))
                )

        found = asyncio.run(all_at_once())
        refused = [r for r in found if r.status_code == 429]
        assert sum(r.status_code == 200 for r in found) == 12 - len(refused) >= 3
        assert refused
        for response in refused:
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "queue_full"
        settled(server)


def test_more_answers_than_may_ever_wait_are_refused_for_good(model: Path, tmp_path: Path) -> None:
    """Such a request was told to come back, again and again. And one that the server's end cuts off gets an error in
    the form of the others: it was "Internal Server Error", with a traceback in the log."""
    limits = ("sequences=1", "queue=2", "prompt_tokens=100", "answer_tokens=400", "stop_s=0")
    with serving(model, tmp_path / "state", *limits) as server:
        found = httpx.post(server.url + URL, json=body(0, n=4), timeout=60)
        assert found.status_code == 400
        assert found.json()["error"]["param"] == "n"
        assert httpx.post(server.url + URL, json=body(0, n=3), timeout=100).status_code == 200

        async def cut_off() -> httpx.Response:
            async with httpx.AsyncClient(base_url=server.url, timeout=200) as client:
                asking = asyncio.ensure_future(client.post(URL, json=body(0, max_tokens=400, ignore_eos=True)))
                while not await asyncio.to_thread(server.metric, "flexgen_sequences"):
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(server.stop)
                return await asking

        last = asyncio.run(cut_off())
        assert last.status_code == 503
        assert last.json()["error"]["code"] == "shutting_down"
        assert "Traceback" not in server.log.read_text()


def test_an_answer_that_takes_too_long_is_ended(model: Path, tmp_path: Path) -> None:
    limits = ("sequences=1", "prompt_tokens=100", "answer_tokens=400", "request_s=1")
    with serving(model, tmp_path / "state", *limits) as server:
        long = body(0, max_tokens=400, ignore_eos=True)

        async def three() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=100) as client:
                return await asyncio.gather(*(client.post(URL, json=long) for _ in range(8)))

        statuses = {response.status_code for response in asyncio.run(three())}
        assert statuses <= {200, 504}
        assert 504 in statuses
        settled(server)
        assert httpx.post(server.url + URL, json=body(0, max_tokens=1), timeout=60).status_code == 200
        # One who sends no body, and one who goes away in the middle of it.
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as slow:
            slow.settimeout(60)
            slow.sendall(f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode())
            assert b" 408 " in slow.recv(100)
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as gone:
            gone.sendall(f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert httpx.post(server.url + URL, json=body(0, max_tokens=1), timeout=60).status_code == 200
        assert "Traceback" not in server.log.read_text()
