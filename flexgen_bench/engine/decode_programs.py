"""Formulas of layers as programs of native calls (``kernels/program.py``), for micro-batches that decode on the
processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from flexgen_bench.kernels.program import Buffers, Program, record
from flexgen_bench.models import formulas
from flexgen_bench.models.parts import Decoder

Project = Callable[[Tensor, Any], tuple[Tensor, Tensor, Tensor]]
Output = Callable[[Tensor, Tensor], Tensor]


class DecodePrograms:
    """Of one lane: its programs share their buffers. most_rows: of a micro-batch."""

    def __init__(self, decoder: Decoder, most_rows: int) -> None:
        self._decoder, self._buffers = decoder, Buffers(most_rows)
        self._tables: Any = None  # what the buffers of angles hold

    def layer(
        self, number: int, weights: Mapping[str, Any], x: Tensor, tables: Any, project: Project, output: Output
    ) -> tuple[Project, Output]:
        """The formulas of the ``number``-th layer, from 0, for hidden states like x (N, hidden): as programs, or as
        they are given where they cannot be one. What ``project`` returns is gone with the next call."""
        if x.shape[0] > self._buffers.rows or x.device.type != "cpu":
            return project, output
        decoder, layer = self._decoder, self._decoder.layers[number]
        projecting = record(
            lambda ops, w, x, tables: formulas.project(ops, decoder, layer, w, x, tables),
            weights,
            (x, tables),
            self._buffers,
        )
        if projecting is None:
            return project, output
        program, free = projecting
        attended = x.new_empty(x.shape[0], layer.attention.rows["q"])
        finishing = record(
            lambda ops, w, x, attended: formulas.output(ops, layer, w, x, attended),
            weights,
            (x, attended),
            self._buffers,
            free,
        )
        return self._projection(program), output if finishing is None else _finish(finishing[0])

    def _projection(self, program: Program) -> Project:
        own_x, own_tables = program.inputs

        def project(x: Tensor, tables: Any) -> tuple[Tensor, Tensor, Tensor]:
            own_x.copy_(x)
            if tables is not self._tables:  # the same for all layers of a pass
                for own, given in zip(own_tables, tables, strict=True):
                    for own_part, part in zip(own, given, strict=True):
                        own_part.copy_(part)
                self._tables = tables
            program.run()
            made: tuple[Tensor, Tensor, Tensor] = program.outputs
            return made

        return project


def _finish(program: Program) -> Output:
    own_x, own_attended = program.inputs

    def output(x: Tensor, attended: Tensor) -> Tensor:
        own_x.copy_(x)
        own_attended.copy_(attended)
        program.run()
        made: Tensor = program.outputs.clone()
        return made

    return output
