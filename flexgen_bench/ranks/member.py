"""A rank other than 0: does what rank 0 asks, until that says the end or is gone."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from flexgen_bench.core.hardware import Accelerator
from flexgen_bench.core.slices import Slice
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.engine import Engine
from flexgen_bench.engine.tokenization import TextTokenizer
from flexgen_bench.ranks.commands import (
    Abandon,
    Check,
    Connect,
    End,
    Failed,
    Generate,
    Load,
    Pack,
    RankReport,
    Reply,
    Setup,
    Unload,
)
from flexgen_bench.ranks.control import Control
from flexgen_bench.ranks.gloo_wire import GlooWire
from flexgen_bench.ranks.identity import hello, weights_digest
from flexgen_bench.ranks.rendezvous import Meeting, go_in


@dataclass
class Member:
    """What a rank holds between commands."""

    meeting: Meeting
    rank: int
    ranks: int
    setup: Setup
    weights: PackedWeights | None = None
    wire: GlooWire | None = None
    engine: Engine | None = None

    def do(self, command: Any) -> Any:
        """Carry out a command; its reply's value."""
        setup = self.setup
        if isinstance(command, Pack):
            part = Slice(self.rank, self.ranks) if setup.shared else None
            self.weights = PackedWeights.from_checkpoint(
                setup.checkpoint, setup.dtype, setup.cache, compression=setup.compression, part=part
            )
            return weights_digest(self.weights)
        if isinstance(command, Connect):
            self.wire = GlooWire(self.meeting.store, command.name, self.rank, self.ranks, self.meeting.interface)
            return None
        if isinstance(command, Load | Unload):
            if self.engine is not None:
                self.engine.close()
                self.engine = None
            if isinstance(command, Load):
                assert self.weights is not None, "Pack comes before Load"
                device = Device.open(setup.hardware, setup.threads)
                stage = command.stages[self.rank]
                self.engine = self.weights.engine(command.policy, device, setup.offload_dir, stage, self.wire)
            return None
        assert self.engine is not None, "Load comes before Check and Generate"
        if isinstance(command, Check):
            self.engine.check(command.requests, command.logits_row_bytes)
            return None
        assert isinstance(command, Generate), command
        tokenizer = TextTokenizer(setup.checkpoint)
        result = self.engine.generate([sequence.start(tokenizer) for sequence in command.sequences])
        assert result.plan is not None
        return RankReport(result.lanes, result.timeline, result.allocated, result.plan.bytes)


def serve_child(meeting: Meeting, rank: int, ranks: int, way: str) -> None:
    """Of a process that rank 0 has started: it says what this rank is made of. way: to its door."""
    control = go_in(meeting, rank, way)
    setup: Setup = control.recv()
    torch.set_num_threads(setup.threads)
    if setup.gpu_cap:
        hold_gpu_to(setup)
    serve(meeting, control, rank, ranks, setup)


def serve(meeting: Meeting, control: Control, rank: int, ranks: int, setup: Setup, patience_s: float = 0.0) -> None:
    """Until rank 0 says the end. If rank 0 is gone, so is this process ``patience_s`` later, whatever it is at."""
    control.send(hello(rank, setup.checkpoint, setup.dtype, setup.compression))
    commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(control, commands, rank, patience_s), name="control", daemon=True).start()
    member = Member(meeting, rank, ranks, setup)
    while not isinstance(command := commands.get(), End):
        try:
            reply: Reply | Failed = Reply(member.do(command))
        except BaseException as error:
            reply = Failed.of(rank, error)
        with suppress(OSError):  # a rank 0 that is gone ends this process, by the other thread
            control.send(reply)


def _receive(control: Control, commands: queue.SimpleQueue[Any], rank: int, patience_s: float) -> None:
    """In a thread of its own, so that the end of rank 0 is seen in the middle of a job. patience_s: how long it is
    given to end by itself, and to say of what."""
    reason = "rank 0 has ended"
    try:
        while not isinstance(command := control.recv(), Abandon):
            commands.put(command)
            if isinstance(command, End):  # what comes after it is the end of the connection
                return
        reason = f"rank 0 has ended the job: {command.reason}"
    except (EOFError, OSError):
        pass
    except BaseException:  # what cannot be read, of another version say: nobody would wait for a reply in vain
        traceback.print_exc()
    if patience_s:
        print(f"rank {rank}: {reason}", file=sys.stderr, flush=True)
        time.sleep(patience_s)
    os._exit(1)


def hold_gpu_to(setup: Setup) -> None:
    """As the process of a cell is held to the memory that the profile gives a device."""
    size = setup.hardware.gpu_memory_bytes
    if setup.hardware.accelerator is Accelerator.CUDA and size is not None:
        total = int(torch.cuda.get_device_properties(0).total_memory)
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), 0)
