"""llama.cpp's own tokenizer, from the xllamacpp wheel: what ids it gives, and which of them end a generation.

In a process of its own, since llama.cpp ends the process that gives it a damaged file. The wheel's Python interface has
no tokenizer, but its library exports llama.cpp's C functions.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="llama.cpp is not here to compare with (pip install xllamacpp)",
)


def llama_cpp(files: Sequence[Path], texts: Sequence[str]) -> list[dict[str, Any]]:
    """For every file either ``error``, or ``ids`` of every text (special tokens in it taken as such) and ``ends``."""
    query = json.dumps({"files": [str(file) for file in files], "texts": list(texts)})
    answer = subprocess.run(
        [sys.executable, __file__], input=query.encode(), capture_output=True, check=False, timeout=300
    )
    assert answer.returncode == 0, answer.stderr.decode(errors="replace")[-2000:]
    answers: list[dict[str, Any]] = json.loads(answer.stdout)
    return answers


class _Params(ctypes.Structure):
    """More room than llama_model_params takes: it is only handed on."""

    _fields_ = (("room", ctypes.c_uint8 * 1024),)


def _library() -> Any:
    import xllamacpp

    folder = Path(str(xllamacpp.__file__)).parent
    library = ctypes.CDLL(str(next(folder.glob("xllamacpp*.so"))))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    library.llama_model_default_params.restype = _Params
    library.llama_model_load_from_file.restype = pointer
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Params]
    library.llama_model_get_vocab.restype = pointer
    library.llama_model_get_vocab.argtypes = [pointer]
    library.llama_model_free.argtypes = [pointer]
    library.llama_vocab_n_tokens.argtypes = [pointer]
    library.llama_vocab_is_eog.restype = ctypes.c_bool
    library.llama_vocab_is_eog.argtypes = [pointer, number]
    library.llama_tokenize.restype = number
    library.llama_tokenize.argtypes = [
        pointer,
        ctypes.c_char_p,
        number,
        ctypes.POINTER(number),
        number,
        ctypes.c_bool,
        ctypes.c_bool,
    ]
    return library


def _answer(library: Any, file: str, texts: Sequence[str], said: list[bytes]) -> dict[str, Any]:
    said.clear()
    model = library.llama_model_load_from_file(file.encode(), library.llama_model_default_params())
    if not model:
        return {"error": b"".join(said).decode(errors="replace")[-600:]}
    vocab = library.llama_model_get_vocab(model)
    ids = []
    for text in texts:
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 16))()
        count = library.llama_tokenize(vocab, raw, len(raw), room, len(room), True, True)
        assert count >= 0
        ids.append(list(room[:count]))
    number = library.llama_vocab_n_tokens(vocab)
    ends = [n for n in range(number) if library.llama_vocab_is_eog(vocab, n)]
    library.llama_model_free(model)
    return {"ids": ids, "ends": ends}


def main() -> None:
    query = json.load(sys.stdin)
    library = _library()
    said: list[bytes] = []
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    keep = callback(lambda level, text, data: said.append(text))
    library.llama_log_set(keep, None)
    library.llama_backend_init()
    json.dump([_answer(library, file, query["texts"], said) for file in query["files"]], sys.stdout)


if __name__ == "__main__":
    main()
