"""Numbers that overflow, and callers that raise or interrupt: the engine stops, tells, and goes on with the next
job."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_bench import LLM, SamplingParams
from flexgen_bench.core.errors import NotFinite, OutOfMemory, UserError
from flexgen_bench.core.tiers import Lane, Site
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.engine import Engine
from flexgen_bench.engine.executor import Executor, LaneSettings
from flexgen_bench.schedule.steps import Step, StepKind
from tests.support.failing_hardware import NEW_TOKENS, RIGS, Leftovers, Tiny, open_files, overflowing, told
from tests.support.tiny_models import random_model, random_prompts, save

pytest_plugins = "tests.support.failure_fixtures"


# Numbers


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.1.self_attn.v_proj.weight", "layer 1 has produced values"),
        ("model.layers.1.self_attn.k_proj.weight", "layer 1 has produced keys"),
        ("model.layers.0.mlp.down_proj.weight", "layer 1 has produced keys"),
        ("model.layers.2.mlp.down_proj.weight", "layer 2 has produced hidden states"),
        ("lm_head.weight", "the head has produced logits"),
    ],
)
@pytest.mark.parametrize("rig", RIGS)
def test_float16_that_overflows_names_the_layer(rig: str, name: str, words: str, tmp_path: Path, offload: Path) -> None:
    hardware, policy = RIGS[rig]
    ckpt, cache = overflowing(tmp_path, name, 8e4)
    prompts, params = random_prompts([6, 3, 11]), SamplingParams(max_tokens=4, ignore_eos=True)
    settings: dict[str, Any] = {"cache_dir": cache, "policy": policy, "gpu": hardware, "threads": 1}
    with LLM(ckpt, dtype="float16", offload_dir=offload, **settings) as llm:
        leftovers = Leftovers(offload)
        for sampling in (params, replace(params, temperature=0.7)):
            with pytest.raises(NotFinite, match=f"{words} that are NaN or infinite") as caught:
                llm.generate(prompts, sampling)
            assert "bfloat16" in str(caught.value), "what to do"
            assert "in step" in told(caught.value)
            leftovers.check()
        with pytest.raises(NotFinite, match=words):
            llm.score(prompts, prompts)
        leftovers.check()
    with LLM(ckpt, dtype="float32", offload_dir=offload, **settings) as llm:
        assert len(llm.generate(prompts, params)) == 3


# Whoever drives the engine


@pytest.mark.parametrize("calls", [1, 4, 15])
def test_an_exception_in_the_progress_callback(engine: Engine, tiny: Tiny, offload: Path, calls: int) -> None:
    leftovers, left = Leftovers(offload), [calls]

    def progress(phase: str, done: int, total: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise LookupError("the callback's own")

    with pytest.raises(LookupError, match="the callback's own"):
        engine.generate(tiny.sequences(), progress)
    leftovers.check()
    tiny.check(engine)


@pytest.mark.parametrize("error", [LookupError("odd"), SystemExit(3), StopIteration("odd")])
def test_an_exception_in_a_stop_test(engine: Engine, tiny: Tiny, offload: Path, error: BaseException) -> None:
    leftovers = Leftovers(offload)

    def stop(new: list[int]) -> bool:
        if len(new) == 3:
            raise error
        return False

    sequences = tiny.sequences(stop_text=stop)
    with pytest.raises(type(error)) as caught:
        engine.generate(sequences)
    assert caught.value is error
    assert "in step sample of unit 4 (lane cpu" in told(error)
    leftovers.check()
    with pytest.raises(UserError, match=r"sequences\[\d\] = '[23] tokens from an earlier job'"):
        engine.generate(sequences)
    tiny.check(engine)


def test_an_exception_in_a_sampler(engine: Engine, tiny: Tiny, offload: Path) -> None:
    class Odd:
        def choose(self, logits: torch.Tensor) -> int:
            raise LookupError("no token is good enough")

    leftovers = Leftovers(offload)
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=1.0)
    with pytest.raises(LookupError, match="good enough"):
        engine.generate(tiny.sequences(sampler=Odd(), params=params))
    leftovers.check()
    tiny.check(engine)


@pytest.mark.parametrize("token", [1, 4])
def test_an_interrupt_while_the_main_thread_waits(engine: Engine, tiny: Tiny, offload: Path, token: int) -> None:
    """A real signal, sent from within a step: the main thread is waiting for it or handing out others."""
    leftovers = Leftovers(offload)

    def stop(new: list[int]) -> bool:
        if len(new) == token:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return False

    with pytest.raises(KeyboardInterrupt):
        engine.generate(tiny.sequences(stop_text=stop))
    leftovers.check()
    tiny.check(engine)


def test_an_interrupt_in_the_progress_callback(engine: Engine, tiny: Tiny, offload: Path) -> None:
    leftovers = Leftovers(offload)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(tiny.sequences(), lambda *_: signal.raise_signal(signal.SIGINT))
    leftovers.check()
    tiny.check(engine)


def test_more_interrupts_while_the_first_one_is_obeyed(engine: Engine, tiny: Tiny, offload: Path) -> None:
    """Impatient people press again; the main thread is waiting for the running step to end then."""
    leftovers, left = Leftovers(offload), [4]

    def stop(new: list[int]) -> bool:
        while left[0]:
            left[0] -= 1
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.1)
        return False

    with pytest.raises(KeyboardInterrupt):
        engine.generate(tiny.sequences(stop_text=stop))
    leftovers.check()
    tiny.check(engine)


def test_abort_waits_for_steps_in_flight_and_drops_the_others() -> None:
    """What steps use is released after it: none may be running, and none may begin."""
    executor = Executor({lane: LaneSettings() for lane in Site.GPU.lanes})
    running, seen = threading.Barrier(len(Site.GPU.lanes) + 1, timeout=20), []
    release = threading.Event()

    def slow(step: Step) -> None:
        running.wait()
        release.wait(20)
        seen.append("ended")

    for lane in Site.GPU.lanes:
        executor.submit(Step(lane, StepKind.ATTEND, 1), slow)
        executor.submit(Step(lane, StepKind.ATTEND, 2), lambda step: seen.append("begun"))
    running.wait()
    threading.Timer(0.2, release.set).start()
    executor.abort()
    assert seen == ["ended"] * len(Site.GPU.lanes)
    with pytest.raises(RuntimeError, match="stopped from outside"):
        executor.submit(Step(Lane.CPU, StepKind.ATTEND, 3), slow)
    executor.close()


# The library


def test_an_llm_goes_on_after_a_failure_and_says_so_after_closing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(random_model("llama-tied-grouped"), tmp_path / "ckpt")
    prompts, params = random_prompts([4, 9]), SamplingParams(max_tokens=4, ignore_eos=True)
    broken = [False]

    def progress(phase: str, done: int, total: int) -> None:
        if broken[0] and phase == "decode":
            raise LookupError("the callback's own")

    files = open_files()
    llm = LLM(folder, dtype="float32", cache_dir=tmp_path / "cache", gpu="cpu", progress=progress)
    expected = [o.token_ids for o in llm.generate(prompts, params)]
    broken[0] = True
    for _ in range(3):
        with pytest.raises(LookupError):
            llm.generate(prompts, params)
    broken[0] = False
    assert [o.token_ids for o in llm.generate(prompts, params)] == expected
    with monkeypatch.context() as patch:  # at another policy's engine
        patch.setattr(Engine, "fits", lambda *_: False)
        patch.setattr(Device, "allocate", _no_memory)
        with pytest.raises(OutOfMemory):
            llm.generate(prompts, params)
    assert [o.token_ids for o in llm.generate(prompts, params)] == expected
    llm.close()
    llm.close()
    assert open_files() == files
    assert not list((tmp_path / "cache").glob("offload-*"))
    with pytest.raises(UserError, match="LLM = 'closed': must be open"):
        llm.generate(prompts, params)


def _no_memory(*arguments: Any) -> Any:
    raise MemoryError("no")


def test_an_interrupted_conversion_leaves_no_store_that_looks_complete(tmp_path: Path) -> None:
    folder = save(random_model("llama-tied-grouped"), tmp_path / "ckpt")

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "convert" and done > total // 2:
            raise KeyboardInterrupt

    files = open_files()
    settings: dict[str, Any] = {"dtype": "float32", "cache_dir": tmp_path / "cache", "gpu": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        LLM(folder, progress=progress, **settings)
    assert open_files() == files
    assert not list((tmp_path / "cache").rglob("manifest.json"))
    assert not list((tmp_path / "cache").glob("offload-*"))
    with LLM(folder, **settings) as llm:
        assert llm.generate([[5, 6]], SamplingParams(max_tokens=2))
