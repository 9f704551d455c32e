"""A rank that fails ends the others, at once and with its reason; and what several ranks cannot do is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexgen_bench.core.errors import DoesNotFit, NotFinite, UserError
from flexgen_bench.core.hardware import Accelerator
from flexgen_bench.core.pipeline import even_stages
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.engine import engine as engine_module
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.engine import Engine
from flexgen_bench.engine.executor import Executor, LaneSettings
from flexgen_bench.engine.generation import to_full_length
from flexgen_bench.engine.local_wire import LocalWire, RankFailed, local_wires
from flexgen_bench.engine.throttle import Throttle, Transfer
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.planner.rank_forecast import rank_forecast
from flexgen_bench.schedule.prefix_tree import ScoreRequest
from flexgen_bench.schedule.sequence_groups import Capacity, Request
from flexgen_bench.schedule.steps import Step, StepKind
from tests.engine.test_engine_tokens import LENGTHS, Reference, on, reference_of
from tests.engine.test_ranks import sequences_of
from tests.support.planner_machines import a_job, accelerator, model_of, small_opt
from tests.support.poisoned_layers import Projected, poison
from tests.support.rank_engines import Rank, all_well, on_ranks
from tests.support.tiny_models import EMULATED, random_prompts

POLICY = Policy(2, 2, on(Tier.CPU), on(Tier.DISK), on(Tier.CPU))
STAGES = even_stages(4, 3)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference_of("qwen2", random_prompts(LENGTHS), tmp_path_factory.mktemp("qwen2"))


def job(reference: Reference, folder: Path, on_engine: Callable[[Engine], None] = lambda engine: None) -> list[Rank]:
    """In the end no lane is left."""
    ranks = on_ranks(
        reference.weights, [POLICY] * 3, EMULATED, STAGES, folder, lambda: sequences_of(reference), on_engine
    )
    lanes = [thread.name for thread in threading.enumerate() if thread.name.startswith("lane-")]
    assert not lanes
    return ranks


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("token", [0, 4])
def test_what_is_not_finite_ends_all_ranks(
    reference: Reference, layer: int, token: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank that has the layer names it, by its number in the model; the others name that rank."""

    def change(made: Projected) -> None:
        made[1].fill_(torch.nan)

    poison(monkeypatch, lambda step: step.unit == layer + 1 and step.micro_batch.token == token, change)
    ranks = job(reference, tmp_path)
    [failed] = [stage.rank for stage in STAGES if layer in stage.layers]
    assert all(isinstance(rank.error, RankFailed) for number, rank in enumerate(ranks) if number != failed)
    with pytest.raises(NotFinite, match=f"layer {layer} has produced keys"):
        all_well(ranks)
    assert f"rank {failed} has failed: NotFinite: " in str(ranks[failed - 1].error)


@pytest.mark.parametrize("rank", range(3))
def test_a_wire_that_is_cut_ends_the_job(reference: Reference, rank: int, tmp_path: Path) -> None:
    """From outside, in the middle of it, as by whoever has seen another rank die: each lane that waits is woken, and
    raises what it was told."""
    lost = ConnectionError("rank 7 was killed")

    def cut(engine: Engine) -> None:
        if engine.stage is not None and engine.stage.rank == rank:
            wire, count = engine.wire, [0]
            assert isinstance(wire, LocalWire)
            name = "recv_tokens" if rank == 0 else "recv_hidden"
            receive = getattr(wire, name)

            def receiving(*given: object) -> object:
                count[0] += 1
                if count[0] == 5:
                    threading.Timer(0, wire.abort, [lost]).start()
                return receive(*given)

            setattr(wire, name, receiving)

    ranks = job(reference, tmp_path, cut)
    assert ranks[rank].error is lost
    assert all(isinstance(r.error, RankFailed) for number, r in enumerate(ranks) if number != rank)


def test_a_rank_that_cannot_begin_ends_the_job(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no lanes yet; the others are already waiting for what it would send."""
    check = engine_module.Engine._check

    def checked(self: Engine, plan: MemoryPlan) -> None:
        if self.stage is not None and self.stage.rank == 1 and len(plan.groups.requests) > 1:
            raise DoesNotFit("cpu", 2, 1, "weights", "Use less.")
        check(self, plan)

    monkeypatch.setattr(engine_module.Engine, "_check", checked)
    ranks = job(reference, tmp_path)
    assert [type(rank.error) for rank in ranks] == [RankFailed, DoesNotFit, RankFailed]


def test_an_interrupt_of_one_rank_ends_all(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(engine: Engine) -> None:
        if engine.stage is not None and engine.stage.is_last:
            told = [0]

            def progress(*_: object) -> None:
                told[0] += 1
                if told[0] > 6:
                    raise KeyboardInterrupt

            generate = engine.generate
            monkeypatch.setattr(engine, "generate", lambda sequences: generate(sequences, progress))

    ranks = job(reference, tmp_path, interrupted)
    assert [type(rank.error) for rank in ranks] == [RankFailed, RankFailed, KeyboardInterrupt]


def test_an_engine_goes_on_with_another_wire(reference: Reference, tmp_path: Path) -> None:
    """After a failed job, its weights still in place."""
    again = local_wires(3)

    def fail_first(engine: Engine) -> None:
        assert engine.stage is not None
        assert engine.wire is not None
        own = to_full_length(reference.prompts, SamplingParams(max_tokens=40))
        if engine.stage.rank == 0:
            engine.wire.abort(ValueError("never mind"))
        with pytest.raises((RankFailed, ValueError)):
            engine.generate(own)
        engine.wire = again[engine.stage.rank]

    ranks = all_well(job(reference, tmp_path, fail_first))
    assert all(rank.tokens == reference.tokens for rank in ranks)


def test_what_several_ranks_cannot_do(reference: Reference, tmp_path: Path) -> None:
    wire = local_wires(2)[0]
    engine = reference.weights.engine(POLICY, Device.open(EMULATED, 1), tmp_path, even_stages(4, 2)[0], wire)
    requests = [ScoreRequest([1, 2, 3], 1)]
    refused: list[tuple[str, Callable[[], object]]] = [
        ("scoring", lambda: engine.score(requests, lambda *_: None)),
        ("scoring", lambda: engine.can_score(requests)),
        ("scoring", lambda: engine.log_probabilities([[1, 2, 3]])),
        ("while it runs", lambda: engine.open(Capacity(1, 4, 4))),
        ("while it runs", lambda: engine.plan_open(Capacity(1, 4, 4, kept_tokens=8))),
    ]
    for words, call in refused:
        with pytest.raises(UserError, match=f"gpu.count = 2: must be 1 for .*{words}"):
            call()
    assert engine.fits([Request(4, 4)])
    engine.close()
    with pytest.raises(ValueError, match="several ranks need a wire"):
        reference.weights.engine(POLICY, Device.open(EMULATED, 1), tmp_path, even_stages(4, 2)[0])


def test_an_emulated_network_delivers_when_a_transfer_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent is there when the link has moved it; what is received takes, from then on, what that is slower, and
    waiting for it is no work. Hidden states and tokens share the link into a rank."""
    happened: list[str] = []
    hold = Throttle.hold

    def held(self: Throttle, transfer: Transfer) -> tuple[float, float]:
        happened.append("moved")
        return hold(self, transfer)

    monkeypatch.setattr(Throttle, "hold", held)
    settings = Device.open(replace(EMULATED, links={"net_out": 1e9, "net_in": 5e8}), 1).lane_settings(network=True)
    assert settings[Lane.NET_IN].link is settings[Lane.NET_TOKENS].link
    assert settings[Lane.NET_OUT].bytes_per_s == 1e9
    assert Lane.NET_OUT not in Device.open(EMULATED, 1).lane_settings()
    executor = Executor({lane: settings[lane] for lane in (Lane.NET_OUT, Lane.NET_IN)})
    for lane, kind in ((Lane.NET_OUT, StepKind.SEND_HIDDEN), (Lane.NET_IN, StepKind.RECV_HIDDEN)):
        executor.wait([executor.submit(Step(lane, kind, 1, bytes=10), lambda step: happened.append(step.kind))])
    executor.close()
    assert happened == ["moved", "send_hidden", "recv_hidden", "moved"]
    free = Executor({Lane.NET_IN: LaneSettings(link=None)})
    gate = threading.Event()
    ticket = free.submit(Step(Lane.NET_IN, StepKind.RECV_HIDDEN, 1, bytes=10), lambda step: gate.wait(60) and None)
    gate.set()
    free.wait([ticket])
    assert free.use()[Lane.NET_IN].busy_s == 0
    free.close()


@pytest.mark.parametrize("rates", [(2e5, 2e5), (2e5, 1e5), (1e5, 2e5)], ids=str)
def test_a_message_takes_as_long_as_it_is_simulated_to(rates: tuple[float, float]) -> None:
    """An emulated network took each message twice, out of one rank and then into the next one, where the simulator has
    it received while it is sent (four emulated ranks behind a slow network took a third longer than simulated)."""
    net_out, net_in = rates
    machine = accelerator(kind=Accelerator.EMULATED, net_out=net_out, net_in=net_in)
    job = a_job(Policy(2, 1, on(Tier.GPU), on(Tier.GPU), on(Tier.GPU)), machine, small_opt(layers=2))
    plans = [
        plan_job(model_of(job.shape), job.policy, machine, job.requests, stage=stage) for stage in even_stages(2, 2)
    ]
    events = rank_forecast(plans, points=None, keep=True).times.events
    links = [Device.open(machine, 1).lane_settings(network=True)[lane].link for lane in (Lane.NET_OUT, Lane.NET_IN)]
    for kind, link in zip((StepKind.SEND_HIDDEN, StepKind.RECV_HIDDEN), links, strict=True):
        message = next(event for event in events if event.step.kind is kind)
        emulated_s = 0.0 if link is None else message.step.bytes / link.bytes_per_s
        assert message.end_s - message.begin_s == pytest.approx(emulated_s, abs=1e-5)
    whole_s = sum(message.step.bytes / link.bytes_per_s for link in links if link is not None)
    assert whole_s == pytest.approx(message.step.bytes / min(rates))
