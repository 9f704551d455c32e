"""``LLM.stream``: the pieces of an answer, as they come, are what ``generate`` gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgen_bench import LLM, Piece, SamplingParams
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.tiers import Tier
from tests.support.tiny_models import EMULATED
from tests.support.tiny_text_models import text_model

PROMPT = "Once upon a time"


@pytest.fixture(scope="module", params=["cpu", "emulated"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """On a processor, and where tokens stay on the accelerator: the next pass is under way when a piece comes."""
    folder = tmp_path_factory.mktemp("stream")
    everything = Placement.all_on(Tier.GPU)
    policy = Policy(4, 1, everything, everything, everything) if request.param == "emulated" else None
    checkpoint, gpu = text_model(folder / "ckpt", "llama"), EMULATED if policy else "cpu"
    with LLM(checkpoint, cache_dir=folder / "cache", threads=1, gpu=gpu, policy=policy) as made:
        yield made


def together(found: list[Piece]) -> tuple[str, list[int], str]:
    assert all(not piece.finish_reason for piece in found[:-1])
    tokens = [token for piece in found for token in piece.token_ids]
    return "".join(piece.text for piece in found), tokens, found[-1].finish_reason


@pytest.mark.parametrize("seed", range(5))
def test_pieces_together_are_the_answer(llm: LLM, seed: int) -> None:
    """Tokens here are single bytes, so that most characters come in several pieces."""
    params = SamplingParams(max_tokens=40, temperature=1.2, seed=seed, ignore_eos=True)
    whole = llm.generate(PROMPT, params)[0]
    found = list(llm.stream(PROMPT, params))
    assert together(found) == (whole.text, list(whole.token_ids), whole.finish_reason)
    assert [len(piece.token_ids) for piece in found] == [1] * 40


def test_a_stop_string_is_not_shown_in_part(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    text = llm.generate(PROMPT, params)[0].text
    stop = next(text[i : i + 3] for i in range(5, len(text)) if text.count(text[i : i + 3]) == 1)
    params = SamplingParams(max_tokens=40, ignore_eos=True, stop=[stop])
    found = list(llm.stream(PROMPT, params))
    assert together(found)[0] == text[: text.index(stop)]
    assert found[-1].finish_reason == "stop"
    assert llm.generate(PROMPT, params)[0].text == together(found)[0]


def test_the_engine_is_taken_until_the_stream_ends(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    stream = llm.stream(PROMPT, params)
    next(stream)
    with pytest.raises(UserError, match="in use by an open job"):
        llm.generate("other", params)
    stream.close()  # type: ignore[attr-defined]
    assert len(llm.generate("other", params)[0].token_ids) == 4


def test_what_is_no_prompt_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(UserError, match="one prompt"):
        llm.stream(["a", "b"])
    with pytest.raises(UserError, match="positions"):
        llm.stream([5] * 500)


def test_closing_the_model_ends_a_stream(tmp_path: Path) -> None:
    llm = LLM(text_model(tmp_path / "ckpt"), cache_dir=tmp_path / "cache", threads=1, gpu="cpu")
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=9, ignore_eos=True))
    next(stream)
    llm.close()
    with pytest.raises(UserError, match="closed"):
        next(stream)
