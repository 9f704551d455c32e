"""The tokenizer inside a GGUF file, made to give llama.cpp's ids.

Built from the file's own vocabulary with the ``tokenizers`` package, not through transformers, whose reader cuts the
words of all byte-level tokenizers alike and knows few of the special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexgen_bench.checkpoints.gguf.header import GGUFHeader
from flexgen_bench.checkpoints.gguf.sentencepiece import sentencepiece_tokenizer
from flexgen_bench.checkpoints.gguf.splitting import SPLITTINGS, Splitting
from flexgen_bench.checkpoints.gguf.vocabulary import PREFIX, TokenKind, Vocabulary, flag, read_vocabulary, strings
from flexgen_bench.core.errors import StoreError, unknown_choice

_MODEL_KEY = f"{PREFIX}model"
_TEMPLATE_KEY = "tokenizer.chat_template"
# Ids of models that do not say: llama.cpp's, for sentencepiece. (For byte-level ones it takes Falcon's 11: not here.)
_SENTENCEPIECE_IDS: Mapping[str, int] = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
_MATCHED_IN_TEXT = (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED)
# Of models with this name, special tokens swallow the spaces behind them, but for these.
_SWALLOW_NAMES, _SWALLOW_NOT = ("phi-3", "phi3"), ("<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True)
class GGUFTokenizer:
    """tokenizer: of transformers, ready to be saved. ends: ids that end a generation, the main one first."""

    tokenizer: Any
    vocabulary: Vocabulary


def gguf_tokenizer(header: GGUFHeader, max_length: int) -> GGUFTokenizer:
    """The tokenizer of a GGUF file. Raises StoreError for a kind that is not understood, naming those that are."""
    kind = header.metadata.get(_MODEL_KEY)
    if kind == "gpt2":
        splitting = _splitting(header)
        vocabulary = read_vocabulary(header, {})
        backend = _byte_level(header, vocabulary, splitting)
        add_bos = flag(header, "add_bos_token", splitting.add_bos)
    elif kind == "llama":
        vocabulary = read_vocabulary(header, _SENTENCEPIECE_IDS)
        prefix = flag(header, "add_space_prefix", True)
        backend = sentencepiece_tokenizer(header, vocabulary, prefix)
        add_bos = flag(header, "add_bos_token", True)
    else:
        raise StoreError(
            f"{header.path}: {_MODEL_KEY} is {kind!r}; 'gpt2' (byte-level BPE) and 'llama' (sentencepiece BPE) can be "
            "read. "
            "Use the checkpoint that the file was converted from."
        )
    _match_special_tokens(header, vocabulary, backend)
    _add_ends(header, vocabulary, backend, add_bos, flag(header, "add_eos_token", False))
    return GGUFTokenizer(_for_transformers(header, vocabulary, backend, max_length), vocabulary)


def _splitting(header: GGUFHeader) -> Splitting:
    # llama.cpp's own answer to a file without the key, or with an empty one.
    name = header.metadata.get(f"{PREFIX}pre") or "default"
    if name not in SPLITTINGS:
        raise StoreError(
            f"{header.path}: {unknown_choice(f'{PREFIX}pre', str(name), SPLITTINGS)}. Words would be cut in the wrong "
            "places; use the checkpoint that the file was converted from."
        )
    return SPLITTINGS[name]


def _byte_level(header: GGUFHeader, vocabulary: Vocabulary, splitting: Splitting) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = []
    for text in strings(header, "merges"):
        # The first space that is not itself the left part.
        left, _, right = text[1:].partition(" ")
        merges.append((text[:1] + left, right))
    ids = {text: number for number, text in enumerate(vocabulary.tokens)}
    try:
        backend = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=splitting.whole_words))
    except Exception as error:  # the package raises nothing more special
        raise StoreError(
            f"{header.path}: {PREFIX}merges do not fit the vocabulary ({error}). Convert the file again."
        ) from error
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    # A byte without a token is left out, but nothing is merged across it.
    lost = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - ids.keys())
    steps += [pre_tokenizers.Split(byte, "removed") for byte in lost]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _match_special_tokens(header: GGUFHeader, vocabulary: Vocabulary, backend: Any) -> None:
    """Tokens that are found in the text before anything else; control tokens are left out when ids become text."""
    from tokenizers import AddedToken

    name = str(header.metadata.get("general.name", "")).lower()
    swallows = any(part in name for part in _SWALLOW_NAMES)
    backend.add_tokens(
        [
            AddedToken(
                text,
                special=kind is not TokenKind.USER_DEFINED,
                normalized=False,
                rstrip=swallows and text not in _SWALLOW_NOT,
            )
            for text, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
            if kind in _MATCHED_IN_TEXT
        ]
    )


def _add_ends(header: GGUFHeader, vocabulary: Vocabulary, backend: Any, add_bos: bool, add_eos: bool) -> None:
    """Start and end tokens around every text, where the file or its kind of tokenizer wants them."""
    from tokenizers import processors

    ends = {"bos": (add_bos, vocabulary.bos), "eos": (add_eos, vocabulary.eos)}
    for name, (is_added, number) in ends.items():
        if is_added and number is None:
            raise StoreError(
                f"{header.path}: {PREFIX}add_{name}_token is true (or so by its kind of tokenizer), and no "
                f"{PREFIX}{name}_token_id of its vocabulary is stated. Convert it again."
            )
    around = {
        name: (vocabulary.tokens[number], number)
        for name, (is_added, number) in ends.items()
        if is_added and number is not None
    }
    if not around:
        return
    before = [around["bos"][0]] if "bos" in around else []
    after = [around["eos"][0]] if "eos" in around else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=list(dict.fromkeys(around.values())),
    )


def _for_transformers(header: GGUFHeader, vocabulary: Vocabulary, backend: Any, max_length: int) -> Any:
    from transformers import PreTrainedTokenizerFast

    def text(number: int | None) -> str | None:
        return None if number is None else vocabulary.tokens[number]

    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=text(vocabulary.bos),
        eos_token=text(vocabulary.eos),
        unk_token=text(vocabulary.unknown),
        pad_token=text(vocabulary.pad),
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
    template = _chat_template(header)
    if template:
        made.chat_template = template
    return made


def _chat_template(header: GGUFHeader) -> str | dict[str, str] | None:
    """The file's template for conversations; by name where it has several."""
    main = header.metadata.get(_TEMPLATE_KEY)
    others = {
        key.removeprefix(f"{_TEMPLATE_KEY}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{_TEMPLATE_KEY}.") and isinstance(value, str)
    }
    if others:
        return ({"default": main} if isinstance(main, str) else {}) | others
    return main if isinstance(main, str) else None
