"""Groups of cells written once for several values: ``matrix: {share: [25, 50]}`` and ``{share}`` where a value goes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from flexgen_bench.config.schema import CellGroupConf
from flexgen_bench.core.errors import UserError, unknown_choice

# A name alone between braces; Hydra's own mappings ({bits: 4}) and interpolations (${oc.env:HOME}) stay.
_PLACE = re.compile(r"(?<!\$)\{([a-z_]+)\}")


def every_group(groups: Iterable[CellGroupConf]) -> list[CellGroupConf]:
    """The groups, each with a matrix replaced by one group per combination of its values, the last name's values
    changing fastest.

    Raises UserError for a matrix without values, for ``{name}`` of a name that it does not have, and for two groups of
    one name.
    """
    made = [one for group in groups for one in _of_matrix(group)]
    seen: set[str] = set()
    for group in made:
        if group.name in seen:
            action = "Put {name} of every name of a matrix into the name of its cells."
            raise UserError("suite.cells.name", group.name, "a name of its own for each cell", action)
        seen.add(group.name)
    return made


def _of_matrix(group: CellGroupConf) -> list[CellGroupConf]:
    if not group.matrix:
        return [group]
    for name, values in group.matrix.items():
        if not values:
            raise UserError(f"suite.cells.matrix.{name}", values, f"a list of values, of the cells {group.name}")
    combinations = itertools.product(*group.matrix.values())
    return [_with_values(group, dict(zip(group.matrix, values, strict=True))) for values in combinations]


def _with_values(group: CellGroupConf, values: Mapping[str, Any]) -> CellGroupConf:
    def filled(text: str) -> str:
        def value_of(place: re.Match[str]) -> str:
            if place.group(1) not in values:
                raise unknown_choice(f"suite.cells {group.name}: {place.group(0)}", place.group(1), values)
            return str(values[place.group(1)])

        return _PLACE.sub(value_of, text)

    return replace(
        group,
        name=filled(group.name),
        overrides=[filled(line) for line in group.overrides],
        system_overrides={name: [filled(line) for line in lines] for name, lines in group.system_overrides.items()},
        matrix={},
    )
