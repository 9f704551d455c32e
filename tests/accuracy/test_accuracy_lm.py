"""Systems of the suite as lm-eval models: equal to lm-eval's own model over transformers, item by item."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from flexgen_bench.accuracy.run.lm import SystemLM, make_lm
from flexgen_bench.accuracy.run.lm_eval import register
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.errors import CannotRun, UserError
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.outputs import Score
from flexgen_bench.llm.llm import LLM
from flexgen_bench.schedule.prefix_tree import PrefixTree, ScoreRequest, grow
from flexgen_bench.systems.scorer import Scorer
from tests.support.tiny_models import EMULATED

VOCAB, POSITIONS = 264, 96
DISK = Placement(disk=1.0)
KINDS: dict[str, Callable[[], Any]] = {
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            ffn_dim=100,
            word_embed_proj_dim=48,
            vocab_size=VOCAB,
            max_position_embeddings=POSITIONS,
            bos_token_id=2,
            eos_token_id=2,
            pad_token_id=1,
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            intermediate_size=90,
            vocab_size=VOCAB,
            max_position_embeddings=POSITIONS,
            bos_token_id=0,
            eos_token_id=2,
        )
    ),
}


def write_tokenizer(folder: Path, starts_with_end: bool = False, lowers: bool = False) -> None:
    """Bytes as tokens. starts_with_end: every text begins with ``</s>``, as for OPT; lowers: capitals are lost."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(special + letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if lowers:
        made.normalizer = normalizers.Lowercase()
    if starts_with_end:
        made.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    bos = "</s>" if starts_with_end else "<s>"
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=bos, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module", params=sorted(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a family, with a tokenizer."""
    found = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    model = KINDS[request.param]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if is_norm else 0.0))
    model.save_pretrained(found)
    write_tokenizer(found, starts_with_end=request.param == "opt")
    return found


@pytest.fixture(scope="module")
def reference(folder: Path) -> HFLM:
    kind = OPTForCausalLM if "opt" in folder.name else LlamaForCausalLM
    return HFLM(
        pretrained=kind.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        device="cpu",
        batch_size=3,
    )


def opened(folder: Path, cache: Path, system: str = "flexgen", **options: Any) -> SystemLM:
    return make_lm(system, folder, dtype="float32", threads=1, cache_dir=cache, **options)


@pytest.fixture(scope="module")
def lm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemLM]:
    made = opened(folder, tmp_path_factory.mktemp("cache"))
    yield made
    made.close()


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]


SHOTS = "Q: is it so? A: yes. Q: and this one? A: no. "
PAIRS = asked(
    "loglikelihood",
    *[(f"{SHOTS}Q: {q}? A:", f" {a}") for q in ("one", "two or", "three") for a in ("yes", "no", "n")],
    *[("The same context", c) for c in ("a", "b", "c", " longer than one")],
    ("spaces at the end  ", "x"),
    ("", "no context"),
    ("short", "s"),
    ("far too long " * 12, "for the model"),
    ("</s>begins with it", " already"),
)
TEXTS = asked("loglikelihood_rolling", ("one text",), ("",), ("a much longer text. " * 15,))
PROMPTS = asked(
    "generate_until",
    ("Say something", {"until": ["zzz"], "max_gen_toks": 9}),
    ("And again", {"until": ["e", "\n"], "max_gen_toks": 20}),
    ("far too long " * 12, {"until": [], "max_gen_toks": 5, "do_sample": False}),
)


def same(found: Sequence[tuple[float, bool]], wanted: Sequence[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [p for p, _ in found] == pytest.approx([p for p, _ in wanted], abs=1e-3)


def test_equals_lm_evals_own_model(lm: SystemLM, reference: HFLM) -> None:
    """Tokens, scores, whole texts and answers, also where they are too long."""
    lm.truncated.clear()
    for string in ("a b", " x ", "</s>y", ""):
        assert lm.tok_encode(string) == reference.tok_encode(string)
    same(lm.loglikelihood(PAIRS, disable_tqdm=True), reference.loglikelihood(PAIRS, disable_tqdm=True))
    assert lm.truncated == {"loglikelihood": 1}
    rolling = reference.loglikelihood_rolling(TEXTS, disable_tqdm=True)
    assert lm.loglikelihood_rolling(TEXTS, disable_tqdm=True) == pytest.approx(rolling, abs=1e-3)
    answers = [reference.generate_until([one], disable_tqdm=True)[0] for one in PROMPTS]
    assert lm.generate_until(PROMPTS, disable_tqdm=True) == answers
    assert lm.truncated == {"loglikelihood": 1, "generate_until": 1}


@pytest.mark.parametrize(
    ("system", "options"),
    [
        ("transformers", {"batch_size": 2}),
        ("flexgen", {"policy": Policy(3, 2, DISK, DISK, DISK, prefill_chunk=11), "gpu": EMULATED}),
    ],
)
def test_any_system_and_placement(
    folder: Path, lm: SystemLM, tmp_path: Path, system: str, options: dict[str, Any]
) -> None:
    other = opened(folder, tmp_path, system, **options)
    same(other.loglikelihood(PAIRS, disable_tqdm=True), lm.loglikelihood(PAIRS, disable_tqdm=True))
    assert other.generate_until(PROMPTS, disable_tqdm=True) == lm.generate_until(PROMPTS, disable_tqdm=True)
    sequences = [[5, 6, 7, 8], [9, 10], list(range(4, 90))]
    pairs = zip(sequences, lm.logprobs(sequences), other.logprobs(sequences), strict=True)
    for tokens, mine, theirs in pairs:
        assert mine.shape == (len(tokens) - 1, VOCAB)
        assert mine.dtype is torch.float32
        assert torch.allclose(mine, theirs, atol=1e-4)
        assert torch.allclose(mine.exp().sum(-1), torch.ones(len(tokens) - 1), atol=1e-5)
    other.close()


def test_sampled_answers_depend_on_the_seed_alone(lm: SystemLM) -> None:
    wanted = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12, "until": []}
    alone = lm.generate_until(asked("generate_until", ("Say", {**wanted, "seed": 3})), True)
    again = lm.generate_until(asked("generate_until", *[("Say", {**wanted, "seed": s}) for s in (3, 4)]), True)
    assert alone[0] == again[0] != again[1]


def test_what_cannot_be_asked(lm: SystemLM) -> None:
    for options, field in (
        ({"max_gen_toks": POSITIONS}, "max_gen_toks"),
        ({"num_beams": 4}, "num_beams"),
        ({"beams": 1}, "beams"),
    ):
        with pytest.raises(UserError, match=field):
            lm.generate_until(asked("generate_until", ("x", {"max_gen_toks": 3, **options})), True)
    with pytest.raises(UserError, match="cannot be scored as a whole"):
        lm.loglikelihood(asked("loglikelihood", ("x", "y" * 200)), True)


def test_a_killed_run_goes_on_where_it_stopped(lm: SystemLM, tmp_path: Path) -> None:
    """Each answer is in lm-eval's cache before the next one is worked on."""

    class Stops(Scorer):
        generate = log_probabilities = None  # type: ignore[assignment]

        def __init__(self, real: Scorer, after: int) -> None:
            self.real, self.after, self.asked = real, after, 0

        def score(self, requests: Sequence[ScoreRequest], on_score: Callable[[int, Score], None]) -> None:
            self.asked = len(requests)

            def take(index: int, score: Score) -> None:
                self.after -= 1
                if self.after < 0:
                    raise KeyboardInterrupt
                on_score(index, score)

            self.real.score(requests, take)

    real = lm._scorer
    whole = lm.loglikelihood(PAIRS, True)
    try:
        lm._scorer = first = Stops(real, 5)
        with pytest.raises(KeyboardInterrupt):
            CachingLM(lm, str(tmp_path / "answers.db")).loglikelihood(PAIRS)
        assert first.asked == len(PAIRS)
        lm._scorer = second = Stops(real, 10**6)
        same(CachingLM(lm, str(tmp_path / "answers.db")).loglikelihood(PAIRS), whole)
        assert second.asked == len(PAIRS) - 5
    finally:
        lm._scorer = real


def test_lm_evals_own_command_line_finds_it(folder: Path, tmp_path: Path) -> None:
    register()
    made = get_model("flexgen").create_from_arg_string(
        f"model={folder},weights=4,weights_group=32,kv_cache=8,value_share=0.5,policy=all-cpu,dtype=float32,"
        f"gpu=cpu,threads=1,cache_dir={tmp_path},max_length=64",
        {"batch_size": 1, "device": None},
    )
    llm = made._scorer._llm
    assert llm.policy.lossy == Lossy(Compression(4, 32), Compression(8), 0.5)
    assert made.max_length == 64
    exact = get_model("flexgen").create_from_arg_obj(
        {"model": str(folder), "system": "transformers", "dtype": "float32", "cache_dir": str(tmp_path)}
    )
    lossy_score, score = (m.loglikelihood(PAIRS[:1], True)[0][0] for m in (made, exact))
    assert 1e-3 < abs(lossy_score - score) < 20
    made.close()
    exact.close()
    for arguments, field in (
        ("weights=4", "model"),
        (f"model={folder},policy=nowhere", "policy"),
        (f"model={folder},wieghts=4", "wieghts"),
        (f"model={folder},system=x", "system"),
    ):
        with pytest.raises(UserError, match=field):
            get_model("flexgen").create_from_arg_string(arguments)
    with pytest.raises(CannotRun, match="lossy"):
        get_model("flexgen").create_from_arg_string(f"model={folder},system=transformers,weights=4")


def test_a_tokenizer_is_needed_that_loses_nothing(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(folder / name)
    with pytest.raises(UserError, match="with a tokenizer"):
        opened(bare, tmp_path)
    write_tokenizer(bare, lowers=True)
    with pytest.raises(UserError, match="comes back as"):
        opened(bare, tmp_path)


def test_sparse_attention_scores_what_it_would_have_decoded(folder: Path, tmp_path: Path) -> None:
    """Rows that predict scored tokens attend as decode steps do; a prompt's own rows attend to everything."""
    lossy = Lossy(value_share=0.2)
    with LLM(folder, dtype="float32", threads=1, cache_dir=tmp_path, lossy=lossy, gpu="cpu") as llm:
        prompts = [[2, *range(5, 40)], [2, *range(90, 60, -2)]]
        made = llm.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
        requests = [ScoreRequest([*p, *o.token_ids], len(p) + 1) for p, o in zip(prompts, made, strict=True)]
        sparse = llm.score_tokens(requests)
        assert all(score.is_greedy for score in sparse)
    with LLM(folder, dtype="float32", threads=1, cache_dir=tmp_path, gpu="cpu") as llm:
        assert abs(llm.score_tokens(requests)[0].logprob - sparse[0].logprob) > 1e-2


# How requests are laid out


def path_of(tree: PrefixTree, row: int) -> list[int]:
    found = []
    while row >= 0:
        found.append(row)
        row = tree.parents[row]
    return found[::-1]


@pytest.mark.parametrize("seed", range(30))
def test_forests_hold_every_request(seed: int) -> None:
    """Each prediction's row has exactly the tokens before it as ancestors, and blocks show each row its ancestors."""
    draw = random.Random(seed)
    letters = draw.choice([2, 3, 50])
    shared = [draw.randrange(letters) for _ in range(draw.choice([0, 5, 60]))]
    requests = []
    for _ in range(draw.randrange(1, 40)):
        own = [draw.randrange(letters) for _ in range(draw.randrange(2, 30))]
        tokens = [*shared[: draw.randrange(len(shared) + 1)], *own]
        requests.append(ScoreRequest(tokens, draw.randrange(1, len(tokens))))
    limit = draw.choice([16, 64, 1000])
    trees = grow(requests, limit)
    seen: dict[int, list[int]] = {i: [] for i in range(len(requests))}
    for tree in trees:
        assert all(parent < row for row, parent in enumerate(tree.parents))
        for row, number, target in tree.predictions:
            path = path_of(tree, row)
            request = requests[number]
            at = len(path)
            assert [tree.tokens[r] for r in path] == list(request.tokens[:at])
            assert [tree.positions[r] for r in path] == list(range(at))
            assert request.tokens[at] == target
            seen[number].append(at)
        covered = 0
        for block in tree.blocks:
            assert block.start == covered < block.stop
            covered = block.stop
            before = [r for a, b in block.before for r in range(a, b)]
            for row in range(block.start, block.stop):
                own = range(block.start, row + 1)
                ancestors = path_of(tree, row)
                if block.branches:
                    assert ancestors[: len(before)] == before
                    assert set(ancestors[len(before) :]) <= set(own)
                else:
                    assert ancestors == [*before, *own]
        assert covered == tree.rows
    for number, request in enumerate(requests):
        assert seen[number] == list(range(request.start, len(request.tokens)))


def test_what_is_shared_is_computed_once() -> None:
    shots, contexts = list(range(300)), [[i] * 20 for i in range(1000, 1040)]
    requests = [ScoreRequest([*shots, *c, x, x], 320) for c in contexts for x in (1, 2, 3, 4)]
    trees = grow(requests, 1024)
    least = 300 + 40 * (20 + 4)
    rows = sum(f.rows for f in trees)
    assert rows <= 1.3 * least
    assert rows < 0.05 * sum(len(r.tokens) for r in requests)
    # One token after the same context takes no row of its own: the context's last row predicts all of them.
    (tree,) = grow([ScoreRequest([7, 8, 9, x], 3) for x in range(5)], 64)
    assert tree.rows == 3
    assert len(tree.predictions) == 5
    assert tree.logit_rows == (2,)
    # A request is never lost by being another's beginning, nor by being asked twice.
    twice = [ScoreRequest([7, 8], 1), ScoreRequest([7, 8, 9], 1), ScoreRequest([7, 8], 1)]
    assert sum(len(f.predictions) for f in grow(twice, 64)) == 4
