"""What was chosen is the same, bit for bit, on the other ranks; and reading it runs nothing."""

from __future__ import annotations

import math
import pickle

import pytest

from flexgen_bench.engine.chosen_payload import decoded, encoded
from flexgen_bench.engine.generation import Chosen
from flexgen_bench.engine.outputs import TokenLogprobs


def test_what_is_decoded_is_what_was_encoded() -> None:
    floats = (-0.1, -1e-45, 0.0, -math.inf, -float.fromhex("0x1.fffffe0000000p-3"), -1 / 3)
    chosen = [
        Chosen(7),
        Chosen(2**17, TokenLogprobs(-2 / 3)),
        *(Chosen(3, TokenLogprobs(value, ((3, value), (9, -math.inf)))) for value in floats),
    ]
    assert decoded(encoded(chosen)) == chosen
    assert decoded(encoded([])) == []
    assert all(isinstance(one, Chosen) for one in decoded(encoded(chosen)))


def test_no_code_of_somebody_in_the_network_is_run() -> None:
    """It was a pickle once."""
    with pytest.raises(ValueError, match=r"decode|Expecting|utf"):
        decoded(pickle.dumps(print))
