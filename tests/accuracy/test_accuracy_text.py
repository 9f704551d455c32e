"""Tasks with tokenizers of the sentencepiece kind: lm-eval's answers, and words scored where a
tokenizer adds an end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from flexgen_bench.accuracy.run.importance import windows_of
from flexgen_bench.accuracy.run.lm import SystemLM, make_lm
from flexgen_bench.accuracy.run.text import TaskText
from flexgen_bench.core.errors import UserError
from tests.support.tiny_tokenizers import END, START, ids_of, model_that_says, sentencepiece

PROMPT = "The capital of France is"
SAID = ("▁Paris", "▁.", "😀", "<|im_end|>", "▁hello", ",")
UNTIL = [[" Paris"], [" ."], ["<|im_end|>"], ["😀"], [" hello"], ["."], []]


def folder_of(tmp_path: Path, end: bool) -> Path:
    made = sentencepiece(end=end)
    said = ids_of(made, *SAID)
    return model_that_says(tmp_path / "ckpt", made, *ids_of(made, "▁is"), said)


def opened(folder: Path, system: str, **options: Any) -> SystemLM:
    return make_lm(system, folder, dtype="float32", threads=1, cache_dir=folder.parent, **options)


def answers(lm: Any) -> Sequence[str]:
    return [
        lm.generate_until(
            [Instance("generate_until", {}, (PROMPT, {"until": [*until], "max_gen_toks": 6}), 0)], disable_tqdm=True
        )[0]
        for until in UNTIL
    ]


@pytest.mark.parametrize(("system", "options"), [("flexgen", {}), ("transformers", {"batch_size": 2})])
def test_answers_are_those_of_lm_eval(tmp_path: Path, system: str, options: dict[str, Any]) -> None:
    """Stop strings with a leading space, of several bytes, of a special token. One that is the
    first word lm-eval's own model does not see, since it looks for it in text without the first
    space; here it ends the answer."""
    folder = folder_of(tmp_path, end=False)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    reference = HFLM(pretrained=model, tokenizer=sentencepiece(), device="cpu")
    with closing(opened(folder, system, **options)) as lm:
        found, wanted = answers(lm), answers(reference)
    assert found[1:] == wanted[1:]
    assert (found[0], wanted[0]) == ("", "Paris .😀")


def test_a_word_is_scored_where_the_tokenizer_adds_an_end(tmp_path: Path) -> None:
    """``</s>`` was scored in its place: lm-eval cuts as many tokens from both together as the
    context has, its end counted in."""
    asked = [Instance("loglikelihood", {}, (PROMPT, w), 0) for w in (" Paris", " hello")]
    with closing(opened(folder_of(tmp_path, end=True), "flexgen")) as lm:
        right, wrong = lm.loglikelihood(asked, disable_tqdm=True)
        assert answers(lm)[-1].startswith("Paris")
    assert right[1]
    assert right[0] > wrong[0] + 5


def test_windows_of_text_have_no_end_in_their_beginning(tmp_path: Path) -> None:
    sentencepiece(end=True).save_pretrained(tmp_path)
    windows = windows_of(tmp_path, f"{PROMPT} Paris. " * 50, 100, 32)
    assert all(window[0] == START and END not in window for window in windows)


def test_text_that_is_none(tmp_path: Path) -> None:
    sentencepiece().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="surrogate"):
        TaskText(tmp_path, 320).encode("bad \ud83d text")
