"""Imputation and error detection (Tables 10 and 11 of the paper) on the restaurants of ``py-entitymatching``."""

from __future__ import annotations

import csv
import random
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from flexgen_bench.accuracy.data.readers.matching import serialize
from flexgen_bench.accuracy.data.readers.products import balanced
from flexgen_bench.accuracy.data.rows import Rows, ordered, split_off

_ATTRIBUTES = ("name", "addr", "city", "phone", "type")


def imputation(folder: Path, *, examples: int, at_least: int, same: Sequence[Sequence[str]] = ()) -> Rows:
    """Which city? All attributes but the city are told. at_least: cities with fewer restaurants are left out. same:
    names of one city, of which the two guides use different ones: each is right.

    The published task imputes the city of these very restaurants (name, addr, phone, type -> city).
    """
    records = _restaurants(folder)
    frequent = Counter(record["city"] for record in records)
    rows = [
        {
            "record": serialize({k: record[k] for k in _ATTRIBUTES if k != "city"}),
            "answers": _names(record["city"], same),
        }
        for record in records
        if frequent[record["city"]] >= at_least
    ]
    return split_off(ordered(rows), examples)


def error_detection(folder: Path, *, examples: int, seed: int) -> Rows:
    """Is there an error in one attribute? Half of the records have a letter of it replaced.

    The published task uses a table of hospitals whose typos are a wrong "x" here and there; it is in no package. seed:
    of attribute, place and letter. label: 1 if the attribute holds an error.
    """
    chance = random.Random(seed)
    rows: list[dict[str, object]] = []
    for number, record in enumerate(_restaurants(folder)):
        attribute = chance.choice(("name", "city", "type"))
        wrong = number % 2 == 1
        value = _typo(record[attribute], chance) if wrong else record[attribute]
        rows.append(
            {
                "record": serialize({**record, attribute: value}),
                "attribute": attribute,
                "value": value,
                "label": int(wrong),
            }
        )
    return balanced(rows, examples)


def _names(city: str, same: Sequence[Sequence[str]]) -> list[str]:
    others = [name for names in same if city in names for name in names if name != city]
    return [city, *others]


def _restaurants(folder: Path) -> list[Mapping[str, str]]:
    by_name_and_city: dict[tuple[str, ...], Mapping[str, str]] = {}
    for name in ("fodors.csv", "zagats.csv"):
        path = next(iter(sorted(folder.rglob(name))))
        with path.open(encoding="utf-8", newline="") as file:
            for raw in csv.DictReader(file):
                record = {key: " ".join(raw[key].split()) for key in _ATTRIBUTES}
                by_name_and_city.setdefault((record["name"], record["city"]), record)
    return [by_name_and_city[key] for key in sorted(by_name_and_city)]


def _typo(text: str, chance: random.Random) -> str:
    places = [i for i, letter in enumerate(text) if not letter.isspace()]
    place = chance.choice(places)
    other = chance.choice([c for c in string.ascii_lowercase if c != text[place].lower()])
    return text[:place] + other + text[place + 1 :]
