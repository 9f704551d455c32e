"""One tiny model for all tests of the server, and one server for those that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgen_bench import LLM
from tests.support.server_process import ServerProcess, serving
from tests.support.tiny_text_models import CHAT_TEMPLATE, text_model

LIMITS = ("sequences=8", "queue=400", "prompt_tokens=300", "answer_tokens=200", "body_bytes=100000")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    return text_model(folder / "ckpt", "llama", positions=512, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, cache_dir=model.parent / "cache", threads=1, gpu="cpu") as made:
        yield made


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(model, tmp_path_factory.mktemp("state") / "state", *LIMITS) as made:
        yield made
