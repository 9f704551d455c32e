"""Tokenizers in GGUF files: the ids of llama.cpp itself, on a page of awkward text and on random strings."""

from __future__ import annotations

import random
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from flexgen_bench.checkpoints.gguf.header import read_header
from flexgen_bench.checkpoints.gguf.splitting import SPLITTINGS
from flexgen_bench.checkpoints.gguf.tokenizer import gguf_tokenizer
from flexgen_bench.checkpoints.gguf.vocabulary import read_vocabulary
from flexgen_bench.checkpoints.gguf_shape import gguf_shape
from flexgen_bench.checkpoints.packages import package_file
from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.model import DType
from flexgen_bench.engine.tokenization import TextTokenizer, load_tokenizer
from tests.support.awkward_texts import AWKWARD
from tests.support.gguf_writing import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Vocabulary,
    byte_level,
    sentencepiece,
    tiny_llama,
    write_llama,
)
from tests.support.llama_cpp import llama_cpp, needs_llama_cpp
from tests.support.shapes import no_progress


def random_texts(count: int, seed: int) -> list[str]:
    """Short strings of every kind of character that is assigned."""
    chance = random.Random(seed)
    known = [c for c in map(chr, range(1, 0x20000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    kinds = [[c for c in known if unicodedata.category(c)[0] == kind] for kind in "LMNPSZ"]
    ascii_, blanks = [chr(n) for n in range(1, 128)], list(" \n\r\t  ")
    pools = [*kinds, ascii_, ascii_, list("abcXYZ"), list("019"), blanks, blanks, known]
    return ["".join(chance.choice(chance.choice(pools)) for _ in range(chance.randint(1, 25))) for _ in range(count)]


def saved(path: Path, vocabulary: Vocabulary, name: str = "t.gguf", **changed: Any) -> Path:
    model = tiny_llama(len(vocabulary.tokens), num_hidden_layers=1)
    return write_llama(path / name, model, vocabulary, **changed)


def our_ids(file: Path, texts: list[str], tmp_path: Path) -> list[list[int]]:
    """Ids of the tokenizer as it is found later: written beside the weights, and read again."""
    folder = tmp_path / f"{file.stem}-tokenizer"
    gguf_tokenizer(read_header(file), 10**6).tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    return [tokenizer(text)["input_ids"] for text in texts]


def check_ids(files: list[Path], texts: list[str], tmp_path: Path) -> None:
    for file, theirs in zip(files, llama_cpp(files, texts), strict=True):
        assert "error" not in theirs, theirs
        ours = our_ids(file, texts, tmp_path)
        for text, mine, expected in zip(texts, ours, theirs["ids"], strict=True):
            assert mine == expected, (file.stem, text)
        vocabulary = read_vocabulary(read_header(file), {"eos_token_id": 2})
        assert sorted(vocabulary.ends) == theirs["ends"], file.stem


def _distinct() -> list[str]:
    """One name for each way of cutting words: the names of one way are the same entry of the table."""
    return list({splitting: name for name, splitting in reversed(SPLITTINGS.items())}.values())


@needs_llama_cpp
def test_words_are_cut_as_llama_cpp_cuts_them(tmp_path: Path) -> None:
    """Every name was once cut like GPT-2 (digits of llama-bpe, lines of qwen2, all of deepseek-llm).

    Patterns are also compared on random strings, whose merges the vocabulary knows.
    """
    texts = [*AWKWARD, *random_texts(150, seed=1)]
    vocabulary = byte_level(texts, size=4000)
    files = [saved(tmp_path, vocabulary, f"{name}.gguf", tokenizer__ggml__pre=name) for name in _distinct()]
    check_ids(files, texts, tmp_path)


@needs_llama_cpp
def test_every_name_means_what_it_means_to_llama_cpp(tmp_path: Path) -> None:
    """The start token that some names bring is compared, too: the file does not say."""
    texts = [text for text in AWKWARD if text][::2]
    vocabulary = byte_level(texts, size=700)
    files = [saved(tmp_path, vocabulary, f"{name}.gguf", tokenizer__ggml__pre=name) for name in SPLITTINGS]
    check_ids(files, texts, tmp_path)


@needs_llama_cpp
def test_a_real_vocabulary(smollm2: tuple[ModelSpec, Path], shared_cache: Path, tmp_path: Path) -> None:
    """Of SmolLM2, as it is published. It lacks some control characters, across which words were merged."""
    spec, folder = smollm2
    texts = [*AWKWARD, *random_texts(200, seed=3), "<|im_start|>user\nhi<|im_end|>\n<reponame>"]
    file = package_file(spec.location, shared_cache, no_progress)
    (theirs,) = llama_cpp([file], texts)
    tokenizer = load_tokenizer(folder)
    assert [tokenizer(text)["input_ids"] for text in texts] == theirs["ids"]
    assert sorted(TextTokenizer(folder).end_ids) == theirs["ends"]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("llama-bpe", "x 123456", ["x", "Ġ", "123", "456"]),
        ("smollm", "x 123", ["x", "Ġ", "1", "2", "3"]),
        ("gpt-2", "x 123456", ["x", "Ġ123456"]),
        ("deepseek-llm", "x 123456", ["x", "Ġ", "123456"]),
        ("qwen2", "a\n\n  b", ["a", "ĊĊ", "Ġ", "Ġb"]),
        ("gpt-2", "a\n\n  b", ["a", "ĊĊĠ", "Ġb"]),
    ],
)
def test_examples_of_cut_words(pre: str, text: str, words: list[str]) -> None:
    """Known by hand, for where llama.cpp is not."""
    from tokenizers import Regex, pre_tokenizers

    cut = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITTINGS[pre].patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert [word for word, _ in cut.pre_tokenize_str(text)] == words


@needs_llama_cpp
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"add_space_prefix": False},
        {"add_bos_token": False, "add_eos_token": True},
        {"bos_token_id": 2, "eos_token_id": 1},
    ],
    ids=["defaults", "no space before", "end instead of start", "ids exchanged"],
)
def test_sentencepiece(keys: dict[str, Any], tmp_path: Path) -> None:
    """Without a word in the file, a start token and a space come first: llama.cpp's defaults."""
    texts = [*AWKWARD, *random_texts(150, seed=2)]
    vocabulary = sentencepiece(texts)
    file = saved(tmp_path, replace(vocabulary, keys=keys))
    (theirs,) = llama_cpp([file], texts)
    for text, mine, expected in zip(texts, our_ids(file, texts, tmp_path), theirs["ids"], strict=True):
        assert mine == expected, text
    made = gguf_tokenizer(read_header(file), 100)
    assert sorted(made.vocabulary.ends) == theirs["ends"]


@pytest.mark.parametrize(("keys", "first"), [({}, [1]), ({"add_bos_token": False}, [])])
def test_a_text_comes_back(keys: dict[str, Any], first: list[int], tmp_path: Path) -> None:
    vocabulary = sentencepiece(AWKWARD)
    tokenizer = gguf_tokenizer(read_header(saved(tmp_path, replace(vocabulary, keys=keys))), 100)
    for text in AWKWARD:
        ids = tokenizer.tokenizer(text)["input_ids"]
        assert ids[: len(first)] == first
        if not any(mark in text for mark in ("<", "[INST]", "▁")):
            assert tokenizer.tokenizer.decode(ids, skip_special_tokens=True) == text


END_CASES: list[tuple[list[str], int]] = [
    (["<|eot_id|>", "<|eom_id|>"], CONTROL),
    (["<|im_end|>", "<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|repo_name|>"], NORMAL),
    (["<|end|>", "<|return|>", "<|call|>", "<|channel|>"], CONTROL),
    (["<|end|>", "<|flush|>", "<|calls|>"], USER_DEFINED),
    (["<|end|>", "<|return|>"], CONTROL),
    (["</s>", "<eos>", "<end_of_turn>", "<fim_prefix>"], NORMAL),
    (["</s>", "<|tool_response>"], CONTROL),
]


@needs_llama_cpp
def test_what_ends_a_generation(tmp_path: Path) -> None:
    """Only ``eos_token_id`` ended one; llama 3's chats end with <|eot_id|>. Tokens are known by their text, too."""
    plain = byte_level(AWKWARD, size=400)
    files = []
    for number, (texts, kind) in enumerate(END_CASES):
        vocabulary = replace(
            plain,
            tokens=(*plain.tokens, *texts, "<turn>"),
            kinds=(*plain.kinds, *[kind] * len(texts), CONTROL),
            keys={
                "pre": "smollm",
                "eos_token_id": 0,
                "eot_token_id": len(plain.tokens) + len(texts),
                "eom_token_id": 2**32 - 1,
            },
        )
        files.append(saved(tmp_path, vocabulary, f"ends{number}.gguf"))
    marks = "".join(sorted({text for texts, _ in END_CASES for text in texts}))
    check_ids(files, [marks, f"a {marks} b"], tmp_path)


def test_the_end_ids_of_a_plain_file(tmp_path: Path) -> None:
    file = saved(tmp_path, byte_level(AWKWARD, size=400, eot_token_id=2, padding_token_id=1))
    made = gguf_tokenizer(read_header(file), 77)
    assert made.vocabulary.ends == (1, 2)
    assert made.tokenizer.eos_token == made.tokenizer.pad_token == "<|end_of_text|>"
    assert made.tokenizer.model_max_length == 77


def test_a_generation_stops_at_each_of_them(tmp_path: Path) -> None:
    """What is written beside the weights is found by the engine and, with AutoModel, by other systems."""
    vocabulary = byte_level(AWKWARD, size=400, eot_token_id=2)
    file = saved(tmp_path, vocabulary)
    spec = ModelSpec(gguf_shape(file), WeightSource.PATH, str(file))
    folder = prepare_checkpoint(spec, DType.FLOAT32, tmp_path, no_progress)
    assert TextTokenizer(folder).end_ids == {1, 2}
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == [1, 2]


def test_the_chat_template_comes_along(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    file = saved(tmp_path, byte_level(AWKWARD, size=400), tokenizer__chat_template=template)
    tokenizer = gguf_tokenizer(read_header(file), 100).tokenizer
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|user|>hi"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == template


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tokenizer__ggml__pre": "kimi-k2"}, r"tokenizer.ggml.pre.*kimi-k2.*must be one of.*llama-bpe"),
    ({"tokenizer__ggml__model": "t5"}, "tokenizer.ggml.model is 't5'; 'gpt2'"),
    ({"tokenizer__ggml__model": None}, "tokenizer.ggml.model is None"),
    ({"tokenizer__ggml__merges": None}, "has no tokenizer.ggml.merges"),
    ({"tokenizer__ggml__merges": ["Q X"]}, "merges do not fit the vocabulary"),
    ({"tokenizer__ggml__tokens": None}, "has no tokenizer.ggml.tokens"),
    ({"tokenizer__ggml__tokens": ["a", "b", "a"]}, "token 'a' is in the vocabulary twice"),
    ({"tokenizer__ggml__token_type": [1, 1]}, "does not hold a number for each of"),
    ({"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__bos_token_id": None}, "no tokenizer.ggml.bos_token_id"),
    ({"tokenizer__ggml__add_bos_token": 1}, "true or false can be read"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_what_is_not_understood_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = saved(tmp_path, byte_level(AWKWARD, size=400), **changed)
    with pytest.raises(StoreError, match=message):
        gguf_tokenizer(read_header(file), 100)


def test_sentencepiece_vocabularies_of_unknown_order(tmp_path: Path) -> None:
    """Some converters wrote the same score everywhere; merging would go wrong without a word."""
    vocabulary = sentencepiece(AWKWARD)
    equal = replace(vocabulary, scores=(-1000.0,) * len(vocabulary.tokens))
    with pytest.raises(StoreError, match=r"have the same score in tokenizer.ggml.scores"):
        gguf_tokenizer(read_header(saved(tmp_path, equal)), 100)
    tokens = tuple("<nobyte>" if token == "<0x41>" else token for token in vocabulary.tokens)
    with pytest.raises(StoreError, match=r"1 tokens for bytes are missing \(<0x41>"):
        gguf_tokenizer(read_header(saved(tmp_path, replace(vocabulary, tokens=tokens))), 100)
    tokens = tuple("QZ" if token == "e" else token for token in vocabulary.tokens)
    with pytest.raises(StoreError, match="holds 'e', which is no token"):
        gguf_tokenizer(read_header(saved(tmp_path, replace(vocabulary, tokens=tokens))), 100)
