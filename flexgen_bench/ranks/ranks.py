"""The other ranks of a model, kept between engines, and started again after they have been lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from flexgen_bench.checkpoints.source import open_source
from flexgen_bench.core.closing import Closing
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.ranks.commands import Setup
from flexgen_bench.ranks.division import Division
from flexgen_bench.ranks.group import RankGroup
from flexgen_bench.ranks.member import serve
from flexgen_bench.ranks.rendezvous import go_in, meet_by_torchrun

_PATIENCE_S = 3.0


class Ranks(Closing):
    """Of rank 0. stages: which rank computes which layers; setting: what has asked for several.

    Raises UserError for ranges of layers that do not cover the model, for layers that ranks cannot share, and for ranks
    that differ from this one.
    """

    def __init__(self, division: Division, setup: Setup) -> None:
        self._division = division
        self._setup = setup = replace(setup, hardware=division.with_disk(setup.hardware, setup.offload_dir))
        self.setting = division.setting
        with open_source(setup.checkpoint) as source:
            division.check(source.shape, setup.dtype, setup.compression)
            self.stages = division.stages(source.shape.num_layers)
        self._weights: PackedWeights | None = None
        self._group: RankGroup | None = RankGroup(division, setup)

    def own(self, device: Device, offload_dir: Path) -> Device:
        """Rank 0's device, with its part of the disk."""
        return replace(device, hardware=self._division.with_disk(device.hardware, offload_dir))

    def pack(self, weights: PackedWeights) -> None:
        """Have them open the same packed weights as this rank."""
        self._weights = weights
        self.group()

    def group(self) -> RankGroup:
        """The ranks as they run now; after a loss other ones. (Of torchrun's there are no others: CannotRun.)"""
        if self._group is None or self._group.error is not None:
            self._group = RankGroup(self._division, self._setup)
        if self._weights is not None and not self._group.is_packed:
            self._group.pack(self._weights)
        return self._group

    def close(self) -> None:
        if self._group is not None:
            self._group.close()


def join(division: Division, setup: Setup) -> Ranks | None:
    """Of rank 0: all ranks, when they are there; None if it is the only one.

    On any other rank this serves rank 0 until that is done, and then ends the process with status 0 (SystemExit): the
    program goes on in rank 0 alone.
    """
    if division.ranks == 1:
        return None
    return Ranks(division, setup) if division.rank == 0 else serve_by_torchrun(division, setup)


def serve_by_torchrun(division: Division, setup: Setup) -> NoReturn:
    torchrun = division.torchrun
    assert torchrun is not None
    setup = replace(setup, hardware=division.with_disk(setup.hardware, setup.offload_dir))
    torch.set_num_threads(setup.threads)
    meeting = meet_by_torchrun(torchrun)
    # torchrun ends all processes as soon as one fails: rank 0, which knows why, is to be the first.
    serve(meeting, go_in(meeting, torchrun.rank), torchrun.rank, torchrun.ranks, setup, patience_s=_PATIENCE_S)
    raise SystemExit(0)
