"""From a package to the rows of a task in the cache, what is checked on the way, and that lm-eval's own way in gives
the same."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexgen_bench.accuracy.data.include import write_include
from flexgen_bench.accuracy.data.prepare import missing, prepare, rows_path
from flexgen_bench.accuracy.data.rows import ordered, text_hash, to_text
from flexgen_bench.accuracy.data.sources import archive, unpack
from flexgen_bench.accuracy.data.task_conf import PackageSpec, TaskSpec, read_tasks
from flexgen_bench.core.errors import StoreError, UserError
from tests.support.accuracy_packages import bigbench, put


def quiet(what: str, done: int, total: int) -> None:
    """No progress is shown."""


def wheel(folder: Path, name: str, files: Mapping[str, str]) -> PackageSpec:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for member, text in files.items():
            file.writestr(member, text)
    return _spec(name, path, "wheel")


def sdist(folder: Path, name: str, files: Mapping[str, str]) -> PackageSpec:
    path = folder / f"{name}-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        for member, text in files.items():
            info = tarfile.TarInfo(member)
            info.size = len(text.encode())
            file.addfile(info, io.BytesIO(text.encode()))
    return _spec(name, path, "sdist")


def _spec(name: str, path: Path, form: str) -> PackageSpec:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return PackageSpec(name, "1.0", form, path.name, digest, path.stat().st_size, "MIT")


def test_only_what_is_asked_for_is_unpacked(tmp_path: Path) -> None:
    files = {"p/a.json": "1", "p/sub/b.json": "2", "p/c.txt": "3"}
    for package in (wheel(tmp_path, "w", files), sdist(tmp_path, "s", files)):
        target = tmp_path / package.form
        unpack(tmp_path / package.file, ["p/*.json"], target, quiet)
        assert sorted(p.name for p in target.rglob("*") if p.is_file()) == ["a.json", "b.json"]
        with pytest.raises(StoreError, match=r"holds nothing like q/\*"):
            unpack(tmp_path / package.file, ["p/*", "q/*"], target, quiet)


def test_another_archive_of_the_same_name_is_refused(tmp_path: Path) -> None:
    package = wheel(tmp_path, "w", {"a": "1"})
    wheel(tmp_path, "w", {"a": "2"})
    with pytest.raises(StoreError, match=r"w-1\.0.*was published with"):
        archive(package, tmp_path, tmp_path, quiet)


def test_a_package_that_cannot_be_had_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    package = PackageSpec("no-such-thing", "1.0", "wheel", "x.whl", "0" * 64, 1, "MIT")
    with pytest.raises(StoreError, match=r"cannot download x\.whl.*--packages FOLDER"):
        archive(package, tmp_path, None, quiet)


def facts(folder: Path, **changes: Any) -> TaskSpec:
    """A task over the package ``facts``, with the hash of its rows; a change is one of its YAML."""
    rows = ordered({"input": f"claim {i}", "choices": ["false", "true"], "gold": i % 2} for i in range(6))
    raw = {
        "version": 3,
        "stands_for": "a test",
        "licence": "MIT",
        "primary_metric": "acc",
        "source": {
            "package": "facts",
            "version": "1.0",
            "files": ["facts/*.json"],
            "reader": "bigbench_choices",
            "options": {"examples": 2},
        },
        "lm_eval": {
            "output_type": "multiple_choice",
            "doc_to_text": "Claim: {{input}}\nTrue or false:",
            "doc_to_target": "gold",
            "doc_to_choice": "choices",
            "num_fewshot": 2,
            "fewshot_config": {"sampler": "first_n"},
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        "data": {
            "fewshot": {"items": 2, "sha256": text_hash(to_text(rows[:2]))},
            "test": {"items": 4, "sha256": text_hash(to_text(rows[2:]))},
        },
        **changes,
    }
    (folder / "facts.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return read_tasks(folder)["facts"]


def facts_package(folder: Path) -> PackageSpec:
    docs = [{"input": f"claim {i}", "target_scores": {"true": i % 2, "false": 1 - i % 2}} for i in range(6)]
    return wheel(folder, "facts", {"facts/task.json": bigbench(*docs), "facts/big.bin": "0" * 1000})


def test_prepare_leaves_rows_and_nothing_else(tmp_path: Path) -> None:
    task, cache = facts(tmp_path), tmp_path / "cache"
    packages = {"facts": facts_package(tmp_path)}
    assert "fetch accuracy" in str(missing(task, cache))
    (done,) = prepare([task], packages, cache, given=tmp_path)
    assert done.fresh
    assert missing(task, cache) is None
    names = sorted(p.name for p in cache.rglob("*") if p.is_file())
    assert names == ["facts-v3-fewshot.jsonl.gz", "facts-v3-test.jsonl.gz"]
    (again,) = prepare([task], packages, cache, given=tmp_path / "gone")
    assert not again.fresh


def test_changed_rows_are_refused(tmp_path: Path) -> None:
    task, cache = facts(tmp_path), tmp_path / "cache"
    prepare([task], {"facts": facts_package(tmp_path)}, cache, given=tmp_path)
    path = rows_path(cache, task, "test")
    path.write_bytes(gzip.compress(b'{"input": "mine"}\n'))
    assert "holds rows of SHA-256" in str(missing(task, cache))
    path.write_bytes(b"torn")
    assert "is damaged" in str(missing(task, cache))


def test_rows_that_the_task_was_not_written_for_are_refused(tmp_path: Path) -> None:
    task = facts(tmp_path, data={"test": {"items": 4, "sha256": "0" * 64}, "fewshot": {"items": 2, "sha256": "1" * 64}})
    with pytest.raises(StoreError, match=r"facts\.yaml says.*raise its version"):
        prepare([task], {"facts": facts_package(tmp_path)}, tmp_path / "cache", given=tmp_path)
    assert not list((tmp_path / "cache").rglob("*.gz"))


def test_unknown_package_and_version_are_named(tmp_path: Path) -> None:
    task, package = facts(tmp_path), facts_package(tmp_path)
    with pytest.raises(UserError, match=r"source\.package = 'facts'"):
        prepare([task], {}, tmp_path / "cache")
    other = {"facts": PackageSpec(**{**package.__dict__, "version": "2.0"})}
    with pytest.raises(UserError, match=r"source\.version = '1\.0'"):
        prepare([task], other, tmp_path / "cache")


# lm-eval's own way in


def _load(folder: Path, name: str) -> Any:
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False).load([name])["tasks"][name]


def test_lm_eval_reads_the_include_folder(tmp_path: Path) -> None:
    task, cache, folder = facts(tmp_path), tmp_path / "cache", tmp_path / "include"
    prepare([task], {"facts": facts_package(tmp_path)}, cache, given=tmp_path)
    put(folder, {"of_yesterday.yaml": "task: of_yesterday"})
    write_include(folder, [task], cache)
    assert [p.name for p in folder.iterdir()] == ["facts.yaml"]
    loaded = _load(folder, "facts")
    assert loaded.VERSION == 3
    assert len(loaded.eval_docs) == 4
    loaded.set_fewshot_seed(1)
    prompts = {loaded.fewshot_context(doc, num_fewshot=2) for doc in loaded.eval_docs}
    heads = {prompt.rpartition("Claim: ")[0] for prompt in prompts}
    assert len(heads) == 1, "all items share their examples, whatever the seed"
    assert heads.pop().count("True or false: ") == 2
    doc = loaded.eval_docs[0]
    assert loaded.process_results(doc, [(-1.0, False), (-2.0, False)])["acc"] == float(doc["gold"] == 0)


def test_limit_takes_the_first_items(tmp_path: Path) -> None:
    task, cache = facts(tmp_path, max_items=3), tmp_path / "cache"
    prepare([task], {"facts": facts_package(tmp_path)}, cache, given=tmp_path)
    found = {}
    for limit in (None, 2):
        folder = tmp_path / f"limit-{limit}"
        write_include(folder, [task], cache, limit=limit)
        found[limit] = list(_load(folder, "facts").eval_docs)
    assert len(found[None]) == 3
    assert found[2] == found[None][:2], "as lm-eval's --limit 2 takes them"


def test_lm_eval_refuses_changed_rows_too(tmp_path: Path) -> None:
    task, cache, folder = facts(tmp_path), tmp_path / "cache", tmp_path / "include"
    prepare([task], {"facts": facts_package(tmp_path)}, cache, given=tmp_path)
    write_include(folder, [task], cache)
    rows_path(cache, task, "fewshot").write_bytes(gzip.compress(b'{"input": "mine"}\n'))
    with pytest.raises(StoreError, match="Numbers would not be comparable"):
        _load(folder, "facts")
