"""Ranks as real processes: the tokens of one, a rank that is killed, and nothing left behind."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from flexgen_bench import LLM, Output, Policy, SamplingParams
from flexgen_bench.core.errors import RankLost, UserError
from flexgen_bench.ranks.group import RankGroup
from tests.support.tiny_models import random_model, random_prompts, save
from tests.support.tiny_text_models import text_model

FULL = SamplingParams(max_tokens=40, ignore_eos=True)
PROMPTS = random_prompts([5, 9, 3, 7, 12, 4] * 4)
# A block of two sequences, so that answers come one after the other.
SMALL = Policy(gpu_batch_size=1, num_gpu_batches=1)


def opened(folder: Path, ranks: int | None = None, policy: Policy | None = None) -> LLM:
    cache = folder.parent / "cache"
    return LLM(folder, gpu="cpu", dtype="float32", threads=2, cache_dir=cache, policy=policy, ranks=ranks)


def rank_processes() -> list[psutil.Process]:
    """Of this process, those that are ranks."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            if "flexgen_bench.ranks" in process.cmdline():
                found.append(process)
    return found


def ids(outputs: Sequence[Output]) -> list[tuple[int, ...]]:
    return [tuple(output.token_ids) for output in outputs]


def test_two_ranks_give_the_tokens_of_one_and_a_kill_is_named(tmp_path: Path) -> None:
    """The text's stop strings are found on every rank, so all of them end a sequence with the same token."""
    folder = text_model(tmp_path / "model")
    sampled = SamplingParams(max_tokens=30, temperature=0.9, seed=4, ignore_eos=True)
    with opened(folder) as one:
        free = one.generate("abc", FULL)[0].text
        stopping = SamplingParams(max_tokens=40, ignore_eos=True, stop=free[3:5])
        jobs = [(PROMPTS, FULL), (PROMPTS[:5], sampled), (["abc", "b"], stopping)]
        expected = [one.generate(prompts, params) for prompts, params in jobs]
        assert expected[2][0].finish_reason == "stop"
    with opened(folder, 2, SMALL) as two:
        for (prompts, params), wanted in zip(jobs, expected, strict=True):
            assert two.generate(prompts, params) == wanted
        assert two.last_job is not None
        assert two.last_job.plan is not None
        assert {"cpu", "cpu:1"} <= {str(lane) for lane in two.last_job.lanes}
        assert {"cpu", "cpu:1"} <= {site.name for site in two.last_job.plan.bytes}
        assert len({lane.origin_s for lane in two.last_job.timeline.lanes.values()}) == 1, "one machine, one clock"
        for refused in (lambda: two.stream("abc"), lambda: two.score(["a"], ["b"])):
            with pytest.raises(UserError, match=r"gpu.count = 2: must be 1 for"):
                list(refused())
        came: dict[int, Output] = {}

        def note(index: int, output: Output) -> None:
            came[index] = output
            if len(came) == 3:
                os.kill(rank_processes()[0].pid, signal.SIGKILL)

        with pytest.raises(RankLost, match="rank 1 is lost: its process was killed by SIGKILL"):
            two.generate(PROMPTS, FULL, note)
        assert rank_processes() == []
        assert 3 <= len(came) < len(PROMPTS)
        assert all(output == expected[0][index] for index, output in came.items())


@pytest.mark.slow
def test_an_interrupt_while_ranks_reply_ends_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one while rank 0 had work of its own did; after another, a reply was taken for that to the next command."""
    folder = save(random_model("opt"), tmp_path / "model")

    def interrupted(group: RankGroup) -> list[object]:
        raise KeyboardInterrupt

    with opened(folder, 2, SMALL) as two:
        expected = ids(two.generate(PROMPTS[:3], FULL))
        with monkeypatch.context() as patched:
            patched.setattr(RankGroup, "_collect", interrupted)
            with pytest.raises(KeyboardInterrupt):
                two.generate(PROMPTS[:3], FULL)
        assert rank_processes() == []
        assert ids(two.generate(PROMPTS[:3], FULL)) == expected


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_of_one_of_four_ranks_at_random_moments(tmp_path: Path) -> None:
    """While they start, while they load, while a job runs: all others end, what had its answer keeps it, and the next
    job begins with new ranks."""
    folder, draw = save(random_model("glm"), tmp_path / "model"), random.Random(20)
    with opened(folder, policy=SMALL) as one:
        expected = ids(one.generate(PROMPTS, FULL))
    took: list[float] = []
    kept: list[int] = []
    with opened(folder, 4, SMALL) as four:
        four.generate(PROMPTS[:2], FULL)
        while len(took) < 50:
            came: dict[int, tuple[int, ...]] = {}
            ended = threading.Event()
            killed: list[float] = []
            # A quarter dies while the ranks start again, the others somewhere in the job.
            after = draw.randrange(len(PROMPTS)) if draw.random() < 0.75 else None
            wait_s = draw.random() * (0.05 if after is not None else 12.0)

            def kill() -> None:
                began = time.monotonic()
                while not ended.is_set():  # noqa: B023
                    due = time.monotonic() - began > wait_s if after is None else len(came) >= after  # noqa: B023
                    processes = rank_processes() if due else []
                    if due and processes:
                        time.sleep(wait_s if after is not None else 0)  # noqa: B023
                        draw.choice(processes).kill()
                        killed.append(time.monotonic())  # noqa: B023
                        return
                    time.sleep(0.002)

            killer = threading.Thread(target=kill, daemon=True)
            killer.start()
            try:
                outputs = four.generate(PROMPTS, FULL, lambda i, output: came.update({i: tuple(output.token_ids)}))  # noqa: B023
                assert ids(outputs) == expected  # it was over before the kill
                lost = None
            except RankLost as error:
                lost = error
            now = time.monotonic()
            ended.set()
            killer.join()
            assert all(expected[i] == tokens for i, tokens in came.items())
            if lost is None:
                continue
            assert "killed by SIGKILL" in str(lost), lost
            assert rank_processes() == [], "an orphan"
            took.append(now - killed[0])
            kept.append(len(came))
            print(
                f"{len(took)}: {took[-1]:.2f} s, {kept[-1]} kept, {'starting' if after is None else 'in a job'}",
                flush=True,
            )
    print(f"\n50 kills: all ended after {max(took):.2f} s at worst, {sorted(took)[25]:.2f} s in the middle; {kept=}")
    assert max(took) < 10
    assert rank_processes() == []
