"""What each reader makes of a small package of the form that the real one has."""

from __future__ import annotations

import bz2
import io
import json
import tarfile
from pathlib import Path

from flexgen_bench.accuracy.data.readers import read
from flexgen_bench.accuracy.data.readers.wikipedia import article_text
from flexgen_bench.accuracy.data.rows import ordered
from tests.support.accuracy_packages import arrow, bigbench, put, requests


def test_order_depends_on_rows_alone() -> None:
    rows = [{"n": n} for n in range(20)]
    assert ordered(rows) == ordered(reversed(rows))
    assert ordered(rows) != rows
    assert len(ordered([*rows, *rows])) == 20


def test_arrow(tmp_path: Path) -> None:
    put(tmp_path, {"a/data.arrow": arrow([{"q": "one", "x": 1}, {"q": "two", "x": 2}])})
    rows = read("arrow", tmp_path, {"keep": {"question": "q"}, "examples": 1})
    assert len(rows["fewshot"]) == len(rows["test"]) == 1
    assert {r["question"] for part in rows.values() for r in part} == {"one", "two"}


def test_hellaswag_loses_its_markup(tmp_path: Path) -> None:
    row = {
        "activity_label": "Cooking",
        "ctx_a": "[header] How to boil [title] Take water.",
        "ctx_b": "then you",
        "endings": ["[step] boil it.", "b", "c", "d"],
        "label": "0",
    }
    put(tmp_path, {"data.arrow": arrow([row])})
    (found,) = read("hellaswag", tmp_path, {})["test"]
    assert found["query"] == "Cooking: How to boil. Take water. Then you"
    assert found["choices"][found["gold"]].strip() == "boil it."


def test_mmlu_shows_its_own_subject(tmp_path: Path) -> None:
    def rows(what: str, count: int) -> bytes:
        return arrow([{"question": f"{what} {i}?", "choices": list("wxyz"), "answer": i % 4} for i in range(count)])

    files = {}
    for subject in ("high_art", "low_art"):
        files[f"{subject}/dev/d.arrow"] = rows(f"dev {subject}", 5)
        files[f"{subject}/test/d.arrow"] = rows(f"test {subject}", 2)
    found = read("mmlu", put(tmp_path, files), {"shots": 2})["test"]
    assert len(found) == 4
    for row in found:
        assert row["shots"].startswith("The following are multiple choice questions (with answers) about ")
        assert row["shots"].count(f"dev {row['subject']}") == 2
        assert row["shots"].endswith("D. z\nAnswer: B\n\n")


def test_requests_are_read_once(tmp_path: Path) -> None:
    docs = [{"query": f"Question: what {i}?\nAnswer:", "answers": ["a", "a", "b"]} for i in range(3)]
    put(tmp_path, {"t/requests.jsonl.gz": requests(docs)})
    keep = {"query": "query", "answers": "answers"}
    rows = read("olmo_docs", tmp_path, {"keep": keep, "strip_question": True})["test"]
    assert sorted(row["query"] for row in rows) == ["what 0?", "what 1?", "what 2?"]
    assert all(row["answers"] == ["a", "b"] for row in rows)
    assert not read("olmo_docs", tmp_path, {"keep": keep, "longest": 5})["test"]


def test_spans_of_one_answer_are_joined(tmp_path: Path) -> None:
    put(tmp_path, {"requests.jsonl.gz": requests([{"query": "q", "answers": [["x", "y"], ["z"]]}])})
    (row,) = read("olmo_docs", tmp_path, {"keep": {"answers": "answers"}})["test"]
    assert row["answers"] == ["x, y", "z"]


def test_coqa_takes_turns_before_the_question_and_free_sources(tmp_path: Path) -> None:
    turns = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(4)]
    docs = [
        {
            "id": "s_turn2",
            "source": "wikipedia",
            "story": "tale",
            "question": "q2",
            "answers": ["a2"],
            "previous_qa": turns,
        },
        {"id": "r_turn0", "source": "race", "story": "tale", "question": "q0", "answers": ["a0"], "previous_qa": turns},
    ]
    put(tmp_path, {"requests.jsonl.gz": requests(docs)})
    options = {"sources": ["wikipedia"], "turns": 1, "longest": 100}
    (row,) = read("coqa", tmp_path, options)["test"]
    assert row["before"] == "Q: q1\nA: a1\n"
    assert (row["question"], row["answers"]) == ("q2", ["a2"])


def test_bigbench_choices_do_not_give_the_answer_away(tmp_path: Path) -> None:
    doc = {"input": "It was said: the sky is green. True?", "target_scores": {"zzz": 1, "aaa": 0}}
    put(tmp_path, {"task.json": bigbench(doc)})
    options = {"strip_to": "said: ", "strip_suffix": " True?"}
    (row,) = read("bigbench_choices", tmp_path, options)["test"]
    assert row == {"input": "the sky is green.", "choices": ["aaa", "zzz"], "gold": 1}


def test_bbq(tmp_path: Path) -> None:
    doc = {
        "input": "A met B. B is old. Who is old?",
        "target_scores": {"B": 1, "A": 0, "Unknown": 0},
        "comment": {"category": "Age", "context_condition": "disambig"},
    }
    (row,) = read("bbq", put(tmp_path, {"a/task.json": bigbench(doc)}), {})["test"]
    assert (row["context"], row["question"]) == ("A met B. B is old.", "Who is old?")
    assert row["choices"][row["gold"]] == "B"
    assert (row["subject"], row["condition"]) == ("Age", "disambig")


def test_summaries(tmp_path: Path) -> None:
    docs = [{"input": "x" * n, "target": f"s{n}"} for n in (1, 20, 30, 90)]
    sizes = {"shortest": 10, "longest": 50, "example_longest": 20}
    rows = read("xsum", put(tmp_path, {"task.json": bigbench(*docs)}), {**sizes, "examples": 1})
    assert [row["summary"] for row in rows["fewshot"]] == ["s20"]
    assert [row["summary"] for row in rows["test"]] == ["s30"]
    lines = "# canary\n" + json.dumps({"source": "y" * 30, "true_cnd": "t"}) + "\n"
    rows = read("cnn_dm", put(tmp_path, {"d/cnn_dm.json": lines}), sizes)
    assert rows["test"] == [{"article": "y" * 30, "summary": "t"}]


def test_snippets_are_clear_cases(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as inner:
        text = (
            b"1\t2.5\tA ''great'' film, truly.\n2\t0.4\tIt is a film, and long.\n3\t-3\tbad\n4\t-2.0\tAn awful, awful "
            b"film.\n"
        )
        info = tarfile.TarInfo("x/movie.txt")
        info.size = len(text)
        inner.addfile(info, io.BytesIO(text))
    put(tmp_path, {"r/data.tar.gz": sink.getvalue()})
    rows = read("snippets", tmp_path, {"member": "movie.txt", "at_least": 1.0, "shortest": 10})["test"]
    assert {(row["text"], row["label"]) for row in rows} == {
        ('A "great" film, truly.', 1),
        ("An awful, awful film.", 0),
    }


def test_product_titles(tmp_path: Path) -> None:
    ask = "Same?\nProduct 1: 'Title: 5\\\" drive'\nProduct 2: 'Title: drive 5\\\"'"
    lines = [{"input": [{"role": "user", "content": ask}], "ideal": ideal} for ideal in ("Yes",)]
    put(tmp_path, {"samples.jsonl": "".join(json.dumps(line) + "\n" for line in lines)})
    (row,) = read("product_titles", tmp_path, {})["test"]
    assert row == {"left": '5" drive', "right": 'drive 5"', "label": 1}


def test_restaurant_pairs(tmp_path: Path) -> None:
    head = (
        "_id,ltable_name,ltable_addr,ltable_city,ltable_phone,rtable_name,rtable_addr,rtable_city,rtable_phone,gold\n"
    )
    labelled = head + "0,a,1 st.,x,1,b,2 st.,y,2,0\n1,c,3 st.,x,3,c,,x,3,1\n2,d,4 st.,x,4,e,5 st.,x,5,0\n"
    known = head + "0,c,3 st.,x,3,c,,x,3,1\n1,f,6 st.,x,6,f,6 st.,x,6,1\n"
    put(tmp_path, {"lbl_restnt_wf1.csv": labelled, "match_fodors_zagats_more_attrs.csv": known})
    rows = read("restaurants", tmp_path, {"examples": 2})
    assert [row["label"] for row in rows["fewshot"]] == [1, 0]
    assert len(rows["test"]) == 2, "a match that is in both tables is asked once"
    everything = [row["right"] for part in rows.values() for row in part]
    assert "name: c. addr: nan. city: x. phone: 3" in everything


def test_publication_pairs(tmp_path: Path) -> None:
    head = (
        "_id,ltable.id,rtable.id,ltable.authors,ltable.title,ltable.venue,ltable.year,"
        "rtable.authors,rtable.title,rtable.venue,rtable.year,gold\n"
    )
    put(
        tmp_path,
        {"dblp_acm_demo_labels.csv": head + "0,i,j,A B,T,V,1999.0,A B,t,W,1999,1\n1,i,k,A,T,V,1999.0,C,U,W,1998,0\n"},
    )
    rows = read("publications", tmp_path, {"examples": 2})["fewshot"]
    assert rows[0]["left"] == "title: T. authors: A B. venue: V. year: 1999"
    assert [row["label"] for row in rows] == [1, 0]


def _restaurants(folder: Path) -> Path:
    head = "id,name,addr,city,phone,type\n"
    lines = [f"{i},place {chr(97 + i)}, {i}  st.,{'big' if i < 8 else f'small{i}'} city,{i},food\n" for i in range(12)]
    return put(folder, {"fodors.csv": head + "".join(lines[:6]), "zagats.csv": head + "".join(lines[6:])})


def test_imputation_does_not_tell_the_city(tmp_path: Path) -> None:
    rows = read("imputation", _restaurants(tmp_path), {"examples": 2, "at_least": 3, "same": [["big city", "bc"]]})
    assert len(rows["fewshot"]) + len(rows["test"]) == 8
    for row in rows["test"]:
        assert row["answers"] == ["big city", "bc"]
        assert "city" not in row["record"]


def test_errors_are_where_they_are_said_to_be(tmp_path: Path) -> None:
    options = {"examples": 2, "seed": 7}
    rows = read("error_detection", _restaurants(tmp_path), options)
    assert [row["label"] for row in rows["fewshot"]] == [1, 0]
    assert rows == read("error_detection", tmp_path, options)
    places = {f"place {chr(97 + i)}" for i in range(12)}
    right = {"name": places, "type": {"food"}, "city": {"big city", *(f"small{i} city" for i in range(8, 12))}}
    for row in [*rows["fewshot"], *rows["test"]]:
        assert f"{row['attribute']}: {row['value']}" in row["record"]
        if row["label"] == 0:
            assert row["value"] in right[row["attribute"]]
        elif row["attribute"] != "name":  # one letter may turn a made-up name into another
            assert row["value"] not in right[row["attribute"]]


def test_wikipedia_reads_like_an_article(tmp_path: Path) -> None:
    source = (
        "{{Infobox {{nested}}}}'''Art''' is a [[skill|human skill]],&lt;ref&gt;x&lt;/ref&gt; and [[good]].\n"
        "[[File:a.png|thumb|See [[this]].]]\n* A list.\n{| class=x\n| A table.\n|}\n== History ==\n"
        "It is old&amp;nbsp;now ({{lang|xx}}).\n==References==\nA book.\n"
    )
    page = f"<page><title>Art</title><ns>0</ns><revision><text>{source}</text></revision></page>"
    other = "<page><title>T</title><ns>1</ns><revision><text>Talk.</text></revision></page>"
    put(tmp_path, {"dump.bz2": bz2.compress(f"<mediawiki>{page}{other}<page>cut".encode())})
    (row,) = read("wikipedia", tmp_path, {"longest": 500, "shortest": 10})["test"]
    assert row == {"subject": "Art", "text": "Art is a human skill, and good.\n\nIt is old now."}
    assert article_text("A sentence.\nNo end") == "A sentence."


def test_wikipedia_pieces_are_within_bounds(tmp_path: Path) -> None:
    text = "\n".join(f"Sentence number {i} of many." for i in range(40)) + "\n" + "word " * 100 + "."
    page = f"<page><title>Art</title><ns>0</ns><revision><text>{text}</text></revision></page>"
    put(tmp_path, {"dump.bz2": bz2.compress(page.encode())})
    rows = read("wikipedia", tmp_path, {"longest": 200, "shortest": 100})["test"]
    assert len(rows) > 4
    assert all(100 <= len(row["text"]) <= 200 for row in rows)


def test_the_learned_text_is_cut_into_whole_sentences(tmp_path: Path) -> None:
    verses = [f"And the [{i}]th man said unto him, Go: and he went.\n" for i in range(3000)]
    source = 'VERSES = """' + "In the beginning God created the heaven.\n" + "".join(verses) + '"""'
    (tmp_path / "plain_text_readers_bible.py").write_text(source, encoding="utf-8")
    pieces = [row["text"] for row in read("king_james", tmp_path, {"longest": 300})["test"]]
    assert max(map(len, pieces)) <= 300
    assert all(piece[-1] in ".:" for piece in pieces)
    assert not any("[" in piece for piece in pieces)
    assert 79_000 < sum(len(piece) + 1 for piece in pieces) <= 80_001
