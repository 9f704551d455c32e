"""From the messages of a conversation to the tokens that a model was trained to answer: the checkpoint's chat template.

The template is a program in the checkpoint (jinja). ``transformers`` runs it in jinja's immutable sandbox; no other
code of the checkpoint is ever run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.given import check_text
from flexgen_bench.engine.tokenization import TextTokenizer

Message = Mapping[str, Any]
_TAKEN = ("role", "content", "name")
_WANTED = "a list of messages such as {'role': 'user', 'content': 'text'}"


def encode_chat(tokenizer: TextTokenizer, messages: Any, field: str = "messages") -> list[int]:
    """Tokens of a conversation up to where the model's answer begins.

    messages: each a mapping with ``role`` and ``content``, text or a list of ``{"type": "text", "text": ...}``; what is
    null or an empty list beside these says nothing, as in the messages that OpenAI's API answers with. Raises UserError
    for what is none, for a checkpoint without a template, and for what its template refuses.
    """
    checked = check_messages(messages, field)
    hf_tokenizer = tokenizer.of_transformers
    if hf_tokenizer is None or not hf_tokenizer.chat_template:
        raise UserError(
            field,
            "a conversation",
            "given to a model with a chat template",
            "This checkpoint has none: it was not trained for conversations. Give it a prompt instead.",
        )
    text = _rendered(hf_tokenizer, checked, field)
    check_text(text, field)  # a template may make anything
    return list(hf_tokenizer(text, add_special_tokens=False)["input_ids"])


def check_messages(messages: Any, field: str = "messages") -> list[dict[str, str]]:
    """The messages with their texts joined. UserError names the first that cannot be used."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UserError(field, messages, _WANTED, "At least one is needed.")
    checked = []
    for index, message in enumerate(messages):
        name = f"{field}[{index}]"
        if not isinstance(message, Mapping):
            raise UserError(name, message, _WANTED.removeprefix("a list of "))
        others = sorted(
            name for name, value in message.items() if name not in _TAKEN and value is not None and value != []
        )
        if others:
            raise UserError(f"{name}.{others[0]}", message[others[0]], "left out", "Messages are role and content.")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise UserError(f"{name}.role", role, "a role such as 'system', 'user' or 'assistant'")
        check_text(role, f"{name}.role")
        # A template that knows nothing of names takes no notice of one.
        named = {} if message.get("name") is None else {"name": _text(message["name"], f"{name}.name")}
        checked.append({"role": role, "content": _text(message.get("content"), f"{name}.content"), **named})
    return checked


def _text(content: Any, field: str) -> str:
    if isinstance(content, str):
        check_text(content, field)
        return content
    if not isinstance(content, Sequence):
        raise UserError(field, content, "text, or a list of {'type': 'text', 'text': ...}")
    texts = []
    for index, part in enumerate(content):
        name = f"{field}[{index}]"
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise UserError(f"{name}.type", kind, "'text'", "Images and sound are not understood.")
        check_text(part.get("text"), f"{name}.text")
        texts.append(str(part["text"]))
    return "\n".join(texts)


def _rendered(tokenizer: Any, messages: list[dict[str, str]], field: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # whatever a template raises: its own exceptions, undefined names, mistakes in it
        first = str(error).strip().splitlines()
        raise UserError(
            field,
            [message["role"] for message in messages],
            "what this model's chat template takes",
            f"It says: {first[0] if first else type(error).__name__}",
        ) from error
