"""Small tokenizers of the kinds that models come with, and a model that says what a test wants it
to say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
UNK, START, END, CHAT_START, CHAT_END = range(5)
# Merges that reach over the words of the tests, scripts of two, three and four bytes a character.
LINES = [
    "The capital of France is Paris. The capital of Spain is Madrid.",
    "Hello, world! It isn't 12 + 30 = 42?\n\nQ: yes\nA: no.",
    "naïve café, größer, Привет мир, 你好世界, こんにちは, 😀👍🏽 — “quotes”",
]
# Pieces of the sentencepiece kinds, beside one for each byte.
WORDS = [
    "▁",
    "▁Paris",
    "▁is",
    "▁The",
    "▁capital",
    "▁of",
    "▁France",
    "Par",
    "is",
    ".",
    ",",
    "'",
    "▁.",
    "▁,",
    "▁n't",
    "▁'s",
    "hello",
    "▁hello",
    "\n",
    "▁▁",
    "é",
    "你",
    "France",
    "Fran",
    "▁Fran",
    "ce",
    "�",
]


def byte_level(start: bool = False, end: bool = False) -> Any:
    """Byte-level BPE, as of GPT-2, OPT, Llama 3 and SmolLM."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        LINES * 3,
        trainers.BpeTrainer(
            vocab_size=360,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    made.add_tokens([AddedToken("<tool>", special=False), AddedToken("   ", special=False)])
    return _wrapped(made, start, end)


def sentencepiece(start: bool = True, end: bool = False, cleanup: bool = False) -> Any:
    """As of Llama 2: a space is put before the text, ``▁`` is a space, unknown characters are
    bytes."""
    made = Tokenizer(models.Unigram(list(_scores().items()), unk_id=UNK, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(SPECIAL)
    return _wrapped(made, start, end, cleanup)


def without_first_space() -> Any:
    """As of Gemma: byte fallback, nothing put before the text."""
    made = Tokenizer(models.Unigram(list(_scores().items()), unk_id=UNK, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(SPECIAL)
    return _wrapped(made, True, False)


def metaspace() -> Any:
    """As of T5 and XLM: the decoder drops the first space, nothing falls back to bytes."""
    words = SPECIAL + [w for w in WORDS if w not in SPECIAL]
    made = Tokenizer(models.Unigram([(w, -1.0 - i / 10) for i, w in enumerate(words)], unk_id=UNK))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(SPECIAL)
    return _wrapped(made, False, False)


def word_piece() -> Any:
    """As of BERT: ``##`` joins, all else is put after a space."""
    words = [*SPECIAL, "the", "capital", "of", "is", "par", "##is", "##s", "hello", "word", "##ly"]
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.add_special_tokens(SPECIAL)
    return _wrapped(made, False, False)


KINDS = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece,
    "no first space": without_first_space,
    "metaspace": metaspace,
    "WordPiece": word_piece,
}


def _scores() -> dict[str, float]:
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [w for w in WORDS if w not in names]
    return {name: -float(place) / 10 for place, name in enumerate(names)}


def _wrapped(made: Tokenizer, start: bool, end: bool, cleanup: bool = False) -> Any:
    template = " ".join((["<s>"] if start else []) + ["$A"] + (["</s>"] if end else []))
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", START), ("</s>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=cleanup,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def model_that_says(folder: Path, tokenizer: Any, prompt: int, said: Sequence[int]) -> Path:
    """A checkpoint that continues any prompt ending with the token ``prompt`` by ``said`` (no token
    twice)."""
    import torch

    chain = [prompt, *said]
    assert len(set(chain)) == len(chain), "one token cannot be followed by two"
    size = 8 * (max(len(tokenizer), *tokenizer.get_vocab().values()) // 8 + 1)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=START,
        eos_token_id=END,
    )
    assert len(chain) <= config.hidden_size
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:  # nothing but the last token counts
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for place, token in enumerate(chain):
            model.model.embed_tokens.weight[token, place] = 1
        for place, token in enumerate(chain[1:]):
            model.lm_head.weight[token, place] = 10
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ids_of(tokenizer: Any, *names: str) -> list[int]:
    """Ids of tokens by their names; a text of several bytes by its fallback bytes."""
    vocabulary, ids = tokenizer.get_vocab(), []
    for name in names:
        known = name in vocabulary
        ids += [vocabulary[name]] if known else [vocabulary[f"<0x{b:02X}>"] for b in name.encode()]
    return ids
