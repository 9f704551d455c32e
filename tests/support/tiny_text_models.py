"""Tiny random models that take text: a tokenizer of bytes beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.tiny_models import _llama, _opt, save

VOCAB = 260  # 256 bytes and four special tokens


# Refuses what some templates refuse: a conversation that the user does not begin.
CHAT_TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('the user begins') }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    """One token for each byte, so that any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = chat_template
    made.save_pretrained(folder)


def text_model(
    folder: Path, family: str = "opt", positions: int = 128, seed: int = 0, chat_template: str | None = None
) -> Path:
    """A random checkpoint with a tokenizer; its groups of 64 values are whole ones."""
    import torch

    torch.manual_seed(seed)
    changes: dict[str, Any] = {"hidden_size": 128, "vocab_size": VOCAB, "max_position_embeddings": positions}
    if family == "opt":
        made = _opt(**changes, num_attention_heads=2, ffn_dim=192, word_embed_proj_dim=128)
    else:
        made = _llama(**changes, num_attention_heads=2, head_dim=64, intermediate_size=192)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if is_norm else 0.0))
    save(made.eval(), folder)
    save_tokenizer(folder, chat_template)
    return folder
