"""Predictions kept from one run to the next: a search for a policy takes seconds, and tables ask for a hundred.

One file of data beside the records. An answer is found again only by everything that decides it: predictor, its constants and options, model, machine, job,
and the code that predicts. After a change of any of these it is computed anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.prediction import Prediction

FILE = "predictions.json"
_VERSION = 2
# What every predictor is made of.
_PACKAGE = Path(__file__).resolve().parents[2]
_SHARED = ("core", "planner", "schedule", "models")
_SECONDS = ("prefill_s", "decode_s")
_COUNTS = ("num_prompts", "prompt_len", "gen_len", "batch_size")
_KEPT = (*_SECONDS, *_COUNTS, "overlapped")
_WORDS = ("word", "reason", "settings", "lossy")


@dataclass(frozen=True)
class Answer:
    """A prediction, or the word that stands for it (OOM, cannot run) and the reason. lossy: what the system then changes of the results,
    in words. asked: the question in words, for readers of the file."""

    run: Prediction | None = None
    word: str = ""
    reason: str = ""
    settings: str = ""
    lossy: str = ""
    asked: str = ""


def key_of(predictor: str, decides: Mapping[str, Any]) -> str:
    """What an answer is found by: ``decides``, the predictor and its code."""
    facts = json.dumps([predictor, decides, _code(predictor)], sort_keys=True, default=str)
    return hashlib.sha256(facts.encode()).hexdigest()[:24]


def load(path: Path) -> dict[str, Answer]:
    """The answers in a file; none if there is no file. Raises StoreError naming the file if it cannot be read, or holds something else."""
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema_version"] != _VERSION:
            raise ValueError(f"schema version {data['schema_version']}")
        return {key: _answer(told) for key, told in data["answers"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise StoreError(f"{path} does not hold predictions ({reason})") from error


def text_of(answers: Mapping[str, Answer]) -> str:
    """The file's text: the same answers give the same bytes."""
    told = sorted(((a.asked, key, _told(a)) for key, a in answers.items()), key=lambda t: t[:2])
    data = {"schema_version": _VERSION, "answers": {key: answer for _, key, answer in told}}
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _told(answer: Answer) -> dict[str, Any]:
    run = None if answer.run is None else {name: getattr(answer.run, name) for name in _KEPT}
    words = {name: getattr(answer, name) for name in _WORDS}
    return {"asked": answer.asked, "run": run} | {k: v for k, v in words.items() if v}


def _answer(told: Mapping[str, Any]) -> Answer:
    run = None if told["run"] is None else _run({k: told["run"][k] for k in _KEPT})
    return Answer(run, asked=str(told["asked"]), **{k: str(told.get(k, "")) for k in _WORDS})


def _run(kept: Mapping[str, Any]) -> Prediction:
    """Raises ValueError for what is no prediction's, TypeError for what is no number."""
    counted = all(isinstance(kept[k], int) and kept[k] > 0 for k in _COUNTS)
    timed = all(0 <= kept[k] < math.inf for k in _SECONDS) and sum(kept[k] for k in _SECONDS) > 0
    if not (counted and timed and isinstance(kept["overlapped"], bool)):
        raise ValueError(f"a run of {kept}")
    return Prediction(**kept)


@cache
def _code(predictor: str) -> str:
    """Of the files that a predictor may be made of: its top-level package, or of ours the parts that predict."""
    top = predictor.partition(":")[0].partition(".")[0]
    files = [f for part in _SHARED for f in (_PACKAGE / part).rglob("*.py")]
    spec = None if top == _PACKAGE.name else importlib.util.find_spec(top)
    if spec is not None:
        folders = [Path(f) for f in spec.submodule_search_locations or ()]
        files += [f for folder in folders for f in folder.rglob("*.py")]
        files += [Path(spec.origin)] if not folders and spec.origin else []
    digest = hashlib.sha256()
    for name, file in sorted((f.name, f) for f in set(files)):
        digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
