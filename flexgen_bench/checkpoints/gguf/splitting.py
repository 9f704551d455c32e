"""How byte-level tokenizers cut text into words before merging: one entry per name of ``tokenizer.ggml.pre``.

Names, patterns and defaults are those of llama.cpp (src/llama-vocab.cpp), which are mostly the published tokenizers'
own; ``tests/test_gguf_splitting.py`` compares the ids with llama.cpp's. Patterns are applied one after the other, each
to the pieces that the one before has left; what a pattern does not match is a piece, too. A name that is not here is
refused: to cut like GPT-2 instead gives other tokens without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"

_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"
# Qwen 2 without contractions, so that Turkish suffixes stay with their apostrophe.
_UFAKZEKA = rf"{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_JAIS2 = (
    rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|\s*[\r\n]+"
    + "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"|\s{1,2}(?!\S)|\s"
)
_SEED_CODER = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_BAILING = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"
    rf"|{_WORD}|\p{{N}}|{_MARKS}|\s*[\r\n]|\s+(?!\S)|\s+"
)
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_MINICPM5 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_MARKS}|{_SPACES}"


def _cased_words(digits: str, contractions: str, letter: str) -> str:
    """Words cut where the case changes, as GPT-4o does. Only the 52 letters of ASCII have a case for llama.cpp."""
    upper, lower = rf"(?:(?={letter})[^a-z])", rf"(?:(?={letter})[^A-Z])"
    first = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{first}{upper}*{lower}+{contractions}|{first}{upper}+{lower}*{contractions}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_TEKKEN = _cased_words(r"\p{N}", "", r"\p{L}")
_GPT4O = _cased_words(r"\p{N}{1,3}", f"{_CONTRACTIONS}?", r"\p{L}")
_GRANITE_EMBED = _cased_words(r"\p{N}{1,3}", f"{_CONTRACTIONS}?", r"[\p{L}\p{M}]")
# Written with the case of every alphabet; llama.cpp takes the categories Lu, Ll, Lt, Lm and Lo all for "letter".
_LETTERS_AND_MARKS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+{_CONTRACTIONS}?"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
# Groups of three digits, counted from the end of a number; what stands before a number stays with its first group.
_DIGITS_FROM_THE_END = r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"

_ASCII_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_DEEPSEEK3 = (
    rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_SPARK = (
    rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
)
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
# Letters that have a case, of Latin, Greek, Cyrillic, Armenian, Georgian, Cherokee and a few more scripts.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ"
    "\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_MARKS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001-\u3002"
# The ranges hold spaces, which llama.cpp has made ASCII ones by then.
_DEEPSEEK_CJK = r"(?:(?!\s)[" + "\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff])+"
_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class Splitting:
    """How one kind of byte-level tokenizer works before its merges.

    patterns: Oniguruma's syntax. whole_words: a word that is a token is one, whatever the merges say. add_bos: whether
    a start token comes first where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


def _table() -> dict[str, Splitting]:
    kinds: Sequence[tuple[str, Splitting]] = (
        (
            "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
            Splitting((_LLAMA3,), whole_words=True, add_bos=True),
        ),
        ("dbrx smaug-bpe glm4 glm5 chatglm-bpe", Splitting((_LLAMA3,))),
        ("jais-2", Splitting((_JAIS2,))),
        ("minicpm5", Splitting((r"\p{N}{1,3}", _MINICPM5), whole_words=True)),
        (
            "deepseek-llm",
            Splitting(
                (
                    r"[\r\n]",
                    rf"\s?[{_DEEPSEEK_LETTERS}]+",
                    rf"\s?[{_DEEPSEEK_MARKS}]+",
                    r"\s+\z",
                    _DEEPSEEK_CJK,
                    r"\p{N}+",
                )
            ),
        ),
        ("deepseek-coder", Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}"))),
        ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", Splitting((r"\p{N}{1,3}", _CJK, _DEEPSEEK3))),
        ("spark2_5", Splitting((r"\p{N}{1,3}", _CJK, _SPARK, r"\p{N}"))),
        (
            "youtu",
            Splitting(
                (
                    "[\uac00-\ud7a3\u3131-\u318e]+|[！…“”‘’—：；，\u3001-\u303f\ufe30-\ufe4f]+"
                    rf"|[\u3105-\u312f]+|{_CJK}",
                    _LETTERS_AND_MARKS % r"\p{N}",
                ),
                whole_words=True,
            ),
        ),
        ("falcon", Splitting((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
        ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", Splitting((r"\p{N}", _GPT2))),
        (
            "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert mpt olmo jais "
            "trillion "
            "granite-docling exaone4 jina-v1-en jina-v2-code roberta-bpe",
            Splitting((_GPT2,)),
        ),
        ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", Splitting((_QWEN2,))),
        ("qwen35", Splitting((_QWEN35,))),
        ("ufakzeka", Splitting((_UFAKZEKA,))),
        ("laguna", Splitting((r"[^\n]+|\n+", _QWEN2))),
        ("poro-chat bloom gpt3-finnish", Splitting((_BLOOM,))),
        ("viking", Splitting((_BLOOM, r"\p{N}"))),
        ("tekken", Splitting((_TEKKEN,), whole_words=True, add_bos=True)),
        ("gpt-4o llama4 kanana2 talkie minimax-m2", Splitting((_GPT4O,))),
        ("granite-embed-multi-97m", Splitting((_GRANITE_EMBED,), whole_words=True)),
        (
            "chameleon",
            Splitting(
                (
                    r"<sentinel:[0-9]+>",
                    r"(?:IMGIMG)[A-I]{1,4}Z",
                    r"[\t\n]|    |  ",
                    r"\p{N}",
                    r"[\p{P}!-/:-@\[-`{-~]",
                    _GPT2,
                ),
                add_bos=True,
            ),
        ),
        ("bailingmoe bailingmoe2 llada-moe", Splitting((_BAILING,))),
        ("seed-coder", Splitting((_SEED_CODER,))),
        ("exaone-moe", Splitting((_EXAONE_MOE,))),
        ("superbpe", Splitting((r"\p{N}+", "(?=(?:[0-9]{3})+(?![0-9]))"))),
        ("tiny_aya cohere2moe", Splitting((_DIGITS_FROM_THE_END, _LETTERS_AND_MARKS % r"\p{N}{1,3}"))),
        (
            "afmoe",
            Splitting(
                (
                    _DIGITS_FROM_THE_END,
                    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff"
                    "\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff"
                    "\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
                    _DEEPSEEK3,
                )
            ),
        ),
        ("default", Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    )
    return {name: kind for names, kind in kinds for name in names.split()}


SPLITTINGS = _table()
