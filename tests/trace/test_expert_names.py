"""What a trace calls the experts that are placed apart from their layers."""

from __future__ import annotations

from pathlib import Path

from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.timeline import Slice, Timeline
from flexgen_bench.schedule.steps import StepKind
from flexgen_bench.trace.chart import COLOURS
from flexgen_bench.trace.runs import TracedRun
from tests.support.record_factory import make_record, make_spec
from tests.support.shapes import mixture_shape


def test_experts_are_named_after_their_layer() -> None:
    """Of three layers the first is dense: units 5 and 6 are the experts of the second and the third."""
    spec = make_spec("flexgen", model=ModelSpec(mixture_shape(), WeightSource.DUMMY))
    run = TracedRun(Path("record"), make_record(spec=spec), Timeline())
    names = ["embedding", "layer 1", "layer 2", "layer 3", "head", "experts of layer 2", "experts of layer 3"]
    assert [run.unit_name(unit) for unit in range(7)] == names
    assert [run.number(unit) for unit in range(7)] == [0, 1, 2, 3, 4, 2, 3]
    load = Slice(str(StepKind.LOAD_EXPERTS), 6, 1, 0, 2, 0.0, 1.0, 10, 0)
    assert run.slice_name(load) == "load_experts experts of layer 3 mb 1"
    assert set(COLOURS) == {str(kind) for kind in StepKind}
