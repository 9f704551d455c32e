"""Text through the library: what was generated is what is shown, and prompts have the tokens that a
continuation needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from baselines.hf_scorer import HFScorer
from flexgen_bench import LLM, SamplingParams
from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.engine.tokenization import TextTokenizer
from flexgen_bench.runner.prompts import build_prompts
from tests.support.shapes import llama_shape
from tests.support.tiny_tokenizers import END, START, byte_level, ids_of, model_that_says, sentencepiece

PROMPT = "The capital of France is"
Open = Callable[..., LLM]


@pytest.fixture
def says(tmp_path: Path) -> Open:
    """An LLM that continues PROMPT by tokens of these names."""

    def open_llm(*names: str, **tokenizer: bool) -> LLM:
        made = sentencepiece(**tokenizer)
        said = ids_of(made, *names)
        return opened(model_that_says(tmp_path / "ckpt", made, *ids_of(made, "▁is"), said))

    return open_llm


def opened(folder: Path) -> LLM:
    cache = folder.parent / "cache"
    return LLM(folder, dtype="float32", threads=1, gpu="cpu", cache_dir=cache)


@pytest.mark.parametrize(
    ("said", "stop", "text", "reason", "count"),
    [
        (["▁Paris", "."], None, " Paris.", "length", 2),
        (["▁Paris", ".", "▁hello"], [" Paris"], "", "stop", 1),
        (["▁Paris", ".", "▁hello"], [". hello"], " Paris", "stop", 3),
        (["▁Paris", "\n", "▁hello"], "\n", " Paris", "stop", 2),
        (["▁Paris", "😀", "."], "😀", " Paris", "stop", 5),
        (["▁Paris", "😀", "."], None, " Paris😀.", "length", 6),
        (["▁Paris", "<0xF0>", "<0x9F>"], None, " Paris\ufffd\ufffd", "length", 3),
        (["▁Paris", "<|im_end|>", "."], ["<|im_end|>"], " Paris", "stop", 2),
        (["▁Paris", "<|im_end|>", "."], [], " Paris.", "length", 3),
        (["▁Paris", "</s>", "."], None, " Paris", "stop", 2),
    ],
)
@pytest.mark.parametrize("cleanup", [False, True])
def test_text_goes_on_after_the_prompt(
    says: Open, said: list[str], stop: Any, text: str, reason: str, count: int, cleanup: bool
) -> None:
    """It was "…France isParis.", stop strings with a leading space never fired, and none that is a
    special token."""
    with says(*said, cleanup=cleanup) as llm:
        most = len(ids_of(sentencepiece(), *said))
        (output,) = llm.generate(PROMPT, SamplingParams(max_tokens=most, stop=stop))
    assert (output.text, output.finish_reason, len(output.token_ids)) == (text, reason, count)


def test_spaces_before_punctuation_stay(says: Open) -> None:
    """``clean_up_tokenization_spaces`` made " ." a ".", and a stop string " ." never fired."""
    names = ["▁Paris", "▁.", "▁hello", "▁,"]
    with says(*names, cleanup=True) as llm:
        texts = [llm.generate(PROMPT, SamplingParams(max_tokens=4, stop=stop))[0].text for stop in ([], [" ."])]
    assert texts == [" Paris . hello ,", " Paris"]


def test_end_tokens_are_put_into_no_prompt(says: Open) -> None:
    """A tokenizer that adds ``</s>`` made the model continue after an end; ``score`` scored that
    end, not the word."""
    with says("▁Paris", ".", end=True) as llm:
        (output,) = llm.generate(PROMPT, SamplingParams(max_tokens=2))
        assert output.text == " Paris."
        assert output.prompt_token_ids[0] == START
        assert END not in output.prompt_token_ids
        right, wrong = llm.score([PROMPT] * 2, [" Paris", " hello"])
        assert right.is_greedy
        assert len(right.token_logprobs) == 1
        assert wrong.logprob < right.logprob - 5
        own_end = llm.generate(f"{PROMPT}</s>", SamplingParams(max_tokens=1))[0].prompt_token_ids
        assert own_end[-2:] == (output.prompt_token_ids[-1], END), "the text's own stays"


@pytest.mark.parametrize("end", [False, True])
def test_a_prompt_that_begins_with_the_start_token_gets_one(says: Open, end: bool) -> None:
    """A chat template writes ``<s>``; the tokenizer added another one."""
    one = SamplingParams(max_tokens=1)
    with says("▁Paris", end=end) as llm:
        ids = [llm.generate(p, one)[0].prompt_token_ids for p in (f"<s>{PROMPT}", PROMPT)]
        assert [i.count(START) for i in ids] == [1, 1]
        assert llm.generate("<s><s>is", one)[0].prompt_token_ids.count(START) == 2, "written twice"


def test_an_empty_prompt_is_the_start_token(tmp_path: Path) -> None:
    """``generate("")`` was refused where ``score([""], ...)`` worked: both begin with the model's
    start token."""
    for name, start in (("added", True), ("not-added", False)):
        made = byte_level(start=start)
        folder = model_that_says(tmp_path / name / "ckpt", made, START, ids_of(made, "a", "b"))
        with opened(folder) as llm:
            (output,) = llm.generate("", SamplingParams(max_tokens=2))
            assert (output.prompt_token_ids, output.text) == ((START,), "ab")
            assert llm.score([""], ["ab"])[0].is_greedy
            # Text that begins with the start token says the same.
            assert llm.score([""], ["<s>ab"]) == llm.score([""], ["ab"])
    made = byte_level()
    made.bos_token = made.eos_token = None
    made.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict.fromkeys(("bos_token_id", "eos_token_id"))))
    (folder / "generation_config.json").unlink()
    with opened(folder) as llm:
        with pytest.raises(UserError, match=r"prompts\[1\] = '': .*start token"):
            llm.generate(["a", ""], SamplingParams(max_tokens=1))
        with pytest.raises(UserError, match=r"contexts\[0\] = '': .*start token"):
            llm.score([""], ["ab"])


def test_a_context_that_ends_within_a_token(tmp_path: Path) -> None:
    """ "Fran" + "ce": the token of both was taken for the context, and the continuation was said to
    be empty."""
    made = sentencepiece()
    made.save_pretrained(tmp_path)
    tokenizer = TextTokenizer(tmp_path)
    start, both = tokenizer.encode_pair("The capital of Fran", "ce is", 0)
    assert made.convert_ids_to_tokens(both[start:]) == ["ce", "▁is"]
    assert both[:start] == tokenizer.encode("The capital of Fran", "context")
    start, both = tokenizer.encode_pair("The capital of ", "France", 0)
    assert made.convert_ids_to_tokens(both[start:]) == ["▁France"]


@pytest.mark.parametrize("kind", [sentencepiece, byte_level])
def test_scores_are_those_of_lm_eval(tmp_path: Path, kind: Callable[..., Any]) -> None:
    """Item by item, with and without a context, also where the text itself begins with the start
    token."""
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    made = kind(start=True)
    folder = tmp_path / "ckpt"
    model = AutoModelForCausalLM.from_pretrained(model_that_says(folder, made, START, [5]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    pairs = [
        (PROMPT, " Paris"),
        (PROMPT, " Paris is."),
        (f"{PROMPT} ", "Paris"),
        ("", "Paris"),
        ("<s>The", " capital"),
        (" ", "Paris"),
        (PROMPT, " 😀 hello"),
        ("", "<s>Paris"),
        ("hello\n", "is"),
    ]
    theirs = lm_eval.HFLM(pretrained=model, tokenizer=made, device="cpu").loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True
    )
    with opened(folder) as llm:
        ours = llm.score([c for c, _ in pairs], [w for _, w in pairs])
    assert [s.logprob for s in ours] == pytest.approx([p for p, _ in theirs], abs=1e-3)
    assert [s.is_greedy for s in ours] == [greedy for _, greedy in theirs]


def test_a_rival_stops_where_the_engine_stops(tmp_path: Path) -> None:
    """Its stop strings were looked for in text without the prompt and without special tokens, all
    of it again for each token."""
    made = sentencepiece()
    said = ids_of(made, "▁Paris", ".", "😀", "<|im_end|>", "▁hello", ",")
    folder = model_that_says(tmp_path / "ckpt", made, *ids_of(made, "▁is"), said)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    stops: list[list[str]] = [[], [" Paris"], ["😀"], ["<|im_end|>"], [" hello,"], ["."], ["no"]]
    params = [SamplingParams(max_tokens=len(said), stop=stop) for stop in stops]
    with opened(folder) as llm:
        ours = llm.generate([PROMPT] * len(stops), params)
        prompts = [list(o.prompt_token_ids) for o in ours]
    found: dict[int, list[int]] = {}
    scorer = HFScorer(model, torch.device("cpu"), 3, folder)
    scorer.generate(prompts, params, lambda index, tokens: found.update({index: list(tokens)}))
    assert [found[i] for i in range(len(stops))] == [list(o.token_ids) for o in ours]


@pytest.mark.parametrize("start", [False, True])
def test_prompts_of_a_cell_have_no_end_token(tmp_path: Path, start: bool) -> None:
    """The ids that all systems of a benchmark are given are those that the library makes of the
    same text."""
    sentencepiece(start=start, end=True).save_pretrained(tmp_path)
    work = Workload("test", PromptKind.TEXT, num_prompts=3, prompt_len=60, gen_len=4)
    shape = llama_shape(vocab_size=320, max_positions=64)
    prompts = build_prompts(work, tmp_path, shape)
    assert all(END not in prompt for prompt in prompts)
    assert [prompt[0] == START for prompt in prompts] == [start] * 3


def test_records_tell_the_text_of_an_answer_after_its_prompt(tmp_path: Path) -> None:
    """What a cell's record says was written began with "Paris", too; special tokens are shown there."""
    made = sentencepiece()
    made.save_pretrained(tmp_path)
    tokenizer, prompt = TextTokenizer(tmp_path), ids_of(made, "<s>", "▁France", "▁is")
    assert tokenizer.text_after((), prompt) == "<s>France is"
    answer = ids_of(made, "▁Paris", "</s>", "😀")
    assert tokenizer.text_after(prompt, answer) == " Paris</s>😀"
    assert TextTokenizer(tmp_path / "none").text_after(prompt, answer) == ""


def test_a_trained_model_stops_at_the_end_of_its_turn(smollm2: tuple[ModelSpec, Path], shared_cache: Path) -> None:
    """Real weights: with ``ignore_eos`` the answer went on into a turn of the user that the model
    made up."""
    chat = "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
    params = [
        SamplingParams(max_tokens=40, ignore_eos=True, stop=stop)
        for stop in (["<|im_end|>"], ["<|im_end|>\n<|im_start|>"], None, [" help you"])
    ]
    with LLM(smollm2[1], cache_dir=shared_cache, dtype="float32", gpu="cpu") as llm:
        turn, both, on, early = llm.generate([chat] * 4, params)
    assert (turn.finish_reason, both.finish_reason, on.finish_reason) == ("stop", "stop", "length")
    assert turn.token_ids[-1] == 2
    assert turn.text
    assert both.text == turn.text
    assert len(both.token_ids) == len(turn.token_ids) + 2
    assert on.text.startswith(turn.text + "\nuser\n")
    assert "<|" not in on.text
    assert turn.text.startswith(early.text + " help you")
