"""One answer while it is made."""

from __future__ import annotations

from collections.abc import Iterator

from flexgen_bench.engine.generation import Running
from flexgen_bench.engine.open_job import OpenJob
from flexgen_bench.engine.outputs import Piece


def pieces(job: OpenJob, sequence: Running) -> Iterator[Piece]:
    """Run a job with this sequence alone; what every pass adds to it. Text that may yet become part of a stop string or
    of another character is held back until it is sure."""
    text = sequence.text
    assert text is not None, "a sequence that is streamed has a text"
    job.add(sequence)
    while not job.is_idle:
        tokens = tuple(new.token for new in job.step())
        text.follow(sequence.new)
        if sequence.finish_reason:
            text.finish()
        yield Piece(text.take_new(), tokens, sequence.finish_reason)
