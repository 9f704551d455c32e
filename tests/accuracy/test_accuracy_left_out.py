"""One item that cannot be scored does not take the others with it: it is named, left out of both sides, and counted."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.accuracy_factory import choice_items, task_record
from tests.support.tiny_text_models import text_model

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from flexgen_bench.accuracy.compare.compare import Margins, compare_task
from flexgen_bench.accuracy.run.lm import SystemLM, make_lm
from flexgen_bench.accuracy.run.run import RequestedTask
from flexgen_bench.cli.accuracy import main
from flexgen_bench.cli.report import main as report
from flexgen_bench.core.errors import UserError
from flexgen_bench.store.accuracy_store import find_task, read_accuracy, read_task, write_accuracy

HALF = "bad \ud83d text"
GOOD = [("the quick brown", " fox"), ("", "no context"), ("a lazy", " dog"), ("spaces  ", "x")]
BAD = {
    "surrogate in the continuation": ("the quick", HALF),
    "surrogate in the context": (HALF, " fox"),
    "empty": ("the quick", ""),
    "empty without context": ("", ""),
    "too long": ("a", " dog" * 400),
    "no text": ("a", None),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("models") / "tiny-opt")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def lm(checkpoint: Path, cache: Path) -> Iterator[SystemLM]:
    made = make_lm("flexgen", checkpoint, dtype="float32", threads=1, cache_dir=cache)
    yield made
    made.close()


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(kind, {}, a, 0, metadata=("quiz", i, 1))  # type: ignore[arg-type]
        for i, a in enumerate(arguments)
    ]


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_the_others_are_scored(bad: Any, lm: SystemLM, capsys: pytest.CaptureFixture[str]) -> None:
    """A lone surrogate ended a task of thousands of items with a bare TypeError, an empty continuation with an
    IndexError."""
    lm.left_out.clear()
    alone = lm.loglikelihood(asked("loglikelihood", *GOOD), True)
    found = lm.loglikelihood(asked("loglikelihood", *GOOD[:2], bad, *GOOD[2:]), True)
    assert [p for p, _ in found[:2] + found[3:]] == pytest.approx([p for p, _ in alone], abs=1e-5)
    assert found[2] == (-math.inf, False)
    assert list(lm.left_out) == ["quiz, item 2"]
    assert "quiz, item 2" in capsys.readouterr().err
    assert lm.get_model_info()["left_out"] == lm.left_out
    with pytest.raises(UserError):
        lm.loglikelihood(asked("loglikelihood", bad), True)


def test_whole_texts_and_answers(lm: SystemLM) -> None:
    lm.left_out.clear()
    texts = lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("one text",), (HALF,), ("",)), True)
    assert texts[0] == lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("one text",)), True)[0]
    assert texts[1:] == [-math.inf, 0.0]
    options = {"until": ["."], "max_gen_toks": 4}
    prompts = [("the quick", options), (HALF, options), ("a lazy", options | {"max_gen_toks": 10**6})]
    answers = lm.generate_until(asked("generate_until", *prompts), True)
    assert answers == [*lm.generate_until(asked("generate_until", prompts[0]), True), "", ""]
    assert "max_gen_toks" in lm.left_out["quiz, item 2"]


def test_no_text_of_an_item_is_told(lm: SystemLM) -> None:
    """Records keep no line of anybody's data, and neither do reasons."""
    for bad in BAD.values():
        why = lm.why_not("loglikelihood", bad)
        assert why
        assert "quick" not in why
        assert "bad" not in why
    assert not lm.why_not("loglikelihood", GOOD[0])


ROWS = [
    {"text": "the quick brown fox", "choices": ["jumps", "dog"], "gold": 0},
    {"text": "a lazy", "choices": ["dog", ""], "gold": 0},
    {"text": HALF, "choices": ["dog", "fox"], "gold": 1},
    {"text": "over the", "choices": ["dog", "fox " * 400], "gold": 1},
    {"text": "nobody is", "choices": ["looking", "quick"], "gold": 1, "note": HALF},
    {"text": "while it is", "choices": ["brown", "looking"], "gold": 1},
    {"text": "the lazy dog", "choices": ["jumps", "fox"], "gold": 1},
]
SCORED = [0, 5, 6]


class Rows(list[dict[str, Any]]):
    """What lm-eval wants of a split; one of ``datasets`` cannot hold half of a surrogate pair."""

    features = dict.fromkeys(("text", "choices", "gold"))


def quiz(rows: list[dict[str, Any]]) -> Callable[..., list[RequestedTask]]:
    from lm_eval.api.task import ConfigurableTask

    def tasks(request: object, limit: int) -> list[RequestedTask]:
        task = ConfigurableTask(
            config={
                "task": "quiz",
                "custom_dataset": lambda **_: {"test": Rows(rows)},
                "test_split": "test",
                "target_delimiter": "",
                "num_fewshot": 0,
                "output_type": "multiple_choice",
                "doc_to_text": "text",
                "doc_to_choice": "choices",
                "doc_to_target": "gold",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            }
        )
        return [RequestedTask("quiz", "1", {"test": "0" * 64}, "acc", len(rows), task)]

    return tasks


def test_a_run_says_what_it_left_out(
    checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flexgen_bench.accuracy.run.run.requested_tasks", quiz(ROWS))
    words = [
        f"model={checkpoint}",
        f"cache_dir={cache}",
        f"results_dir={tmp_path}",
        "threads=1",
        "text_tokens=64",
        "mode=w8",
    ]
    main(words)
    told = capsys.readouterr()
    found = [r for _, r in read_accuracy(tmp_path).tasks]
    assert {r.subject.mode for r in found} == {"exact", "w8"}
    for record in found:
        assert [int(item.id.partition("-")[0]) for item in record.items] == SCORED
        assert [int(name.partition("-")[0]) for name in record.left_out] == [1, 2, 3, 4]
        assert record.scores["acc"] == pytest.approx(sum(i.parts[0] for i in record.items) / 3)
    assert "item 2-" in told.err
    assert "quiz: 4 of 7 items cannot be scored" in told.out
    assert report([str(tmp_path), str(tmp_path / "out"), "--tables", "none"]) == 0
    (page,) = (tmp_path / "out" / "accuracy").glob("tiny*.md")
    assert "Left out, quiz: 4 of 7 items cannot be scored" in page.read_text()
    rows = list(csv.DictReader(io.StringIO((page.parent / "tasks.csv").read_text())))
    assert [(row["n"], row["left_out"]) for row in rows] == [("3", "4")]
    main(words)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"] == [], "it is done"


def test_a_task_of_which_nothing_can_be_scored(
    checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flexgen_bench.accuracy.run.run.requested_tasks", quiz(ROWS[2:4]))
    words = [f"model={checkpoint}", f"cache_dir={cache}", f"results_dir={tmp_path}", "text_tokens=0"]
    assert main(words) == 2
    assert "items of task quiz" in capsys.readouterr().err


def test_an_item_that_one_side_lacks_is_in_neither() -> None:
    """Another reference may see fewer tokens: what it cannot score must not count for the mode beside it."""
    items = choice_items(60, 0.7)
    left = {items[0].id: "too long", items[1].id: "too long"}
    before = task_record(items[2:], left_out=left)
    after = task_record(items[3:], "w4", left_out={items[2].id: "empty"})
    found = compare_task(before, after, Margins())
    assert (found.n, found.left_out) == (57, 3)
    assert found.reference == pytest.approx(sum(i.parts[0] for i in items[3:]) / 57)


def test_records_from_before_are_read(tmp_path: Path) -> None:
    path = write_accuracy(task_record(choice_items(5, 0.5)), tmp_path)
    data = json.loads(gzip.decompress(path.read_bytes()))
    del data["left_out"]
    path.write_bytes(gzip.compress(json.dumps(data | {"schema_version": 1}).encode()))
    record = read_task(path)
    assert record.left_out == {}
    assert find_task(tmp_path, record.subject.model, record.key, 5) == path
    assert find_task(tmp_path, record.subject.model, record.key, 6) is None
