"""The library: prompts of any kind in any number, sampling, stopping, scoring, and clear refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flexgen_bench import LLM, Placement, Policy, SamplingParams
from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.errors import DoesNotFit, StoreError, UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from tests.support.tiny_models import VOCAB, greedy_reference, random_model, random_prompts, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model("llama-tied-grouped"), tmp_path_factory.mktemp("llm") / "ckpt")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, dtype="float32", cache_dir=folder.parent / "cache", threads=1, gpu="cpu") as made:
        yield made


def small(folder: Path, policy: Policy) -> LLM:
    return LLM(folder, dtype="float32", cache_dir=folder.parent / "cache", threads=1, gpu="cpu", policy=policy)


def test_greedy_equals_transformers_in_the_order_asked(llm: LLM) -> None:
    prompts = random_prompts([12, 1, 7])
    outputs = llm.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))
    assert [list(o.token_ids) for o in outputs] == greedy_reference(random_model("llama-tied-grouped"), prompts, 6)
    assert all(
        o.finish_reason == "length" and list(o.prompt_token_ids) == p for o, p in zip(outputs, prompts, strict=True)
    )


@pytest.mark.parametrize(
    "policy", [Policy(1, 1), Policy(2, 1), Policy(3, 2), Policy(2, 9, kv_cache=Placement(disk=1.0))]
)
def test_sampled_tokens_do_not_depend_on_batching(folder: Path, llm: LLM, policy: Policy) -> None:
    prompts = random_prompts([3, 9, 4, 4, 11], seed=1)
    params = SamplingParams(
        max_tokens=8, temperature=0.9, top_k=30, top_p=0.9, repetition_penalty=1.2, seed=7, ignore_eos=True
    )
    expected = [o.token_ids for o in llm.generate(prompts, params)]
    with small(folder, policy) as other:
        assert [o.token_ids for o in other.generate(prompts, params)] == expected
    again = [o.token_ids for o in llm.generate(prompts, SamplingParams(**{**vars(params), "seed": 8}))]
    assert again != expected


def test_stop_ids_and_different_lengths_in_one_job(llm: LLM) -> None:
    prompts = random_prompts([5, 5, 8])
    free = llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
    stop = free[0].token_ids[3]
    first = free[0].token_ids.index(stop)
    params = [
        SamplingParams(max_tokens=8, stop_token_ids=(stop, VOCAB + 5), ignore_eos=True),
        SamplingParams(max_tokens=2, ignore_eos=True),
        SamplingParams(max_tokens=8, ignore_eos=True),
    ]
    outputs = llm.generate(prompts, params)
    assert outputs[0].token_ids == free[0].token_ids[: first + 1]
    assert outputs[0].finish_reason == "stop"
    assert outputs[1].token_ids == free[1].token_ids[:2]
    assert outputs[2].token_ids == free[2].token_ids


def test_scores_equal_transformers(llm: LLM) -> None:
    model = random_model("llama-tied-grouped")
    contexts, continuations = (random_prompts([4, 9, 1, 6], seed=2), random_prompts([3, 1, 12, 5], seed=3))
    scores = llm.score(contexts, continuations)
    for context, continuation, score in zip(contexts, continuations, scores, strict=True):
        ids = torch.tensor([context + continuation])
        with torch.no_grad():
            logprobs = model(ids).logits[0].float().log_softmax(-1)
        rows = logprobs[len(context) - 1 : -1]
        expected = rows.gather(1, torch.tensor(continuation)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(score.token_logprobs), expected, atol=1e-4)
        assert score.logprob == pytest.approx(float(expected.sum()), abs=1e-3)
        assert score.is_greedy == bool((rows.argmax(-1) == torch.tensor(continuation)).all())


def test_scores_do_not_depend_on_batching(folder: Path, llm: LLM) -> None:
    contexts, continuations = random_prompts([4, 9, 1], seed=2), random_prompts([3, 1, 12], seed=3)
    together = llm.score(contexts, continuations)
    with small(folder, Policy(1, 1, weights=Placement(disk=1.0))) as other:
        for i, score in enumerate(other.score(contexts, continuations)):
            assert score.logprob == pytest.approx(together[i].logprob, abs=1e-4)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        ([[]], r"prompts\[0\].*at least one token"),
        ([[5], [5, VOCAB]], rf"prompts\[1\].*0 to {VOCAB - 1}"),
        ([[-1]], "token ids from 0"),
        ([[5] * 60], "at most 64 positions"),
        (["some text"], "no tokenizer"),
        ([[1.5]], "integers"),
    ],
)
def test_bad_prompts_are_refused(llm: LLM, prompts: list, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(UserError, match=message):
        llm.generate(prompts, SamplingParams(max_tokens=8))


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"stop": [""]},
        {"stop_token_ids": [-2]},
        {"seed": "x"},
    ],
)
def test_bad_sampling_params_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]


def test_stop_string_without_tokenizer_is_refused(llm: LLM) -> None:
    with pytest.raises(UserError, match="stop"):
        llm.generate([[5]], SamplingParams(stop="x"))


def test_unknown_names_list_the_choices(folder: Path) -> None:
    with pytest.raises(UserError, match=r"opt-1\.3b.*Did you mean"):
        LLM("opt-1.3")
    with pytest.raises(UserError, match="emulated"):
        LLM(folder, gpu="voodoo")
    with pytest.raises(UserError, match="bfloat16"):
        LLM(folder, dtype="int3", gpu="cpu")


def test_policies_that_cannot_be_followed_are_refused_before_any_work(folder: Path) -> None:
    with pytest.raises(UserError, match="without accelerator"):
        small(folder, Policy(weights=Placement(gpu=1.0)))
    with pytest.raises(UserError, match="sum to 1"):
        Placement(cpu=0.5)
    tight = HardwareProfile("tiny", Accelerator.EMULATED, gpu_memory_bytes=1000)
    with pytest.raises(DoesNotFit, match=r"tier gpu.*weights.*capacity of 1000 B"):
        LLM(
            folder,
            gpu=tight,
            policy=Policy(weights=Placement(gpu=1.0)),
            dtype="float32",
            cache_dir=folder.parent / "cache",
        )


def test_a_job_that_does_not_fit_is_refused_and_the_next_one_runs(folder: Path) -> None:
    gpu = HardwareProfile("small", Accelerator.EMULATED, gpu_memory_bytes=700_000, links={"h2d": 4e9})
    policy = Policy(8, 1, Placement(cpu=1.0), Placement(gpu=1.0), Placement(gpu=1.0), prefetch=1)
    with LLM(folder, gpu=gpu, policy=policy, dtype="float32", cache_dir=folder.parent / "cache") as llm:
        with pytest.raises(DoesNotFit, match="tier gpu"):
            llm.generate(random_prompts([40] * 8), SamplingParams(max_tokens=20))
        assert len(llm.generate(random_prompts([4]), SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


def test_auto_policy_goes_down_the_tiers_as_memory_shrinks(folder: Path) -> None:
    lowest = []
    for memory in (2**28, 1_500_000, 700_000):
        gpu = HardwareProfile("g", Accelerator.EMULATED, gpu_memory_bytes=memory, links={"h2d": 4e9})
        with LLM(folder, gpu=gpu, dtype="float32", cache_dir=folder.parent / "cache") as llm:
            out = llm.generate(random_prompts([9] * 6), SamplingParams(max_tokens=4, ignore_eos=True))
            assert [list(o.token_ids) for o in out] == greedy_reference(
                random_model("llama-tied-grouped"), random_prompts([9] * 6), 4
            )
            assert llm.policy is not None
            lowest.append(llm.policy.weights.gpu)
    assert lowest[0] == 1.0
    assert lowest[0] > lowest[-1]


def test_unwritable_offload_dir_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="offload_dir"):
        LLM(folder, policy=Policy(), offload_dir=tmp_path / "file", gpu="cpu", cache_dir=folder.parent / "cache")


def test_a_trained_model_continues_text(smollm2: tuple[ModelSpec, Path], shared_cache: Path) -> None:
    """Real weights, real tokenizer: text in, sensible text out, stop strings cut, scores ordered."""
    with LLM(smollm2[1], cache_dir=shared_cache, dtype="float32", gpu="cpu") as llm:
        outputs = llm.generate(["The capital of France is", "One, two, three, four,"], SamplingParams(max_tokens=8))
        assert outputs[0].text.startswith(" Paris")
        assert outputs[1].text.startswith(" five")
        stopped = llm.generate("One, two, three, four,", SamplingParams(max_tokens=8, stop=[" six"]))[0]
        assert stopped.text == " five,"
        assert stopped.finish_reason == "stop"
        right, wrong = llm.score(["The capital of France is"] * 2, [" Paris", " Lima"])
        assert right.logprob > wrong.logprob
        assert right.is_greedy


def test_a_short_answer_at_the_last_position_beside_a_long_one(tmp_path: Path) -> None:
    """A sequence that has ended keeps its row; its position used to run past the model's table."""
    folder = save(random_model("opt"), tmp_path / "ckpt")
    prompts = random_prompts([64, 2])
    params = [SamplingParams(max_tokens=1, ignore_eos=True), SamplingParams(max_tokens=50, ignore_eos=True)]
    for weights in (Placement(cpu=1.0), Placement(disk=1.0)):
        policy = Policy(2, 1, weights=weights)
        with LLM(folder, dtype="float32", cache_dir=tmp_path / "cache", gpu="cpu", policy=policy) as llm:
            outputs = llm.generate(prompts, params)
        assert [len(o.token_ids) for o in outputs] == [1, 50]
        assert list(outputs[1].token_ids) == greedy_reference(random_model("opt"), prompts[1:], 50)[0]


@pytest.mark.parametrize("threads", [0, -1, 1.5])
def test_bad_thread_counts_are_refused(folder: Path, threads: float) -> None:
    """-1 used to end a lane before it began, and the caller waited for ever."""
    with pytest.raises(UserError, match="threads"):
        LLM(folder, gpu="cpu", threads=threads, cache_dir=folder.parent / "cache")  # type: ignore[arg-type]


def test_nothing_runs_code_from_a_model_folder(tmp_path: Path) -> None:
    folder = save(random_model("opt"), tmp_path / "ckpt")
    (folder / "tokenizer.json").write_text("{}")
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass Evil: pass\n")
    with (
        LLM(folder, gpu="cpu", dtype="float32", cache_dir=tmp_path / "cache") as llm,
        pytest.raises(StoreError, match="tokenizer"),
    ):
        llm.generate("some text")
    assert not (tmp_path / "owned").exists()


def test_a_closed_llm_and_wrong_types_are_refused(folder: Path) -> None:
    llm = LLM(folder, gpu="cpu", dtype="float32", cache_dir=folder.parent / "cache")
    for prompts in (None, 7, torch.tensor([[1, 2]])):
        with pytest.raises(UserError, match="prompts"):
            llm.generate(prompts)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="sampling_params"):
        llm.generate([[5]], {"max_tokens": 3})  # type: ignore[arg-type]
    llm.close()
    with pytest.raises(UserError, match="closed"):
        llm.generate([[5]])
