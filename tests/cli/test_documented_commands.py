"""Every command of README, CONTRIBUTING and docs is run as it is printed, or with the small change that the table below
states. A command in nobody's table fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.documented import ROOT, blocks, commands

LADDER = "up to an hour; tests/cells/test_ladder_suite.py runs the small one"
SLURM = "needs a SLURM cluster; tests/cli/test_launchers.py runs another launcher"
GPU = "needs a CUDA device"


@dataclass(frozen=True)
class How:
    """How a command is run. swap: words that are replaced; add: what is added at its end; status: how it may end; says:
    what it then prints.

    skip: why it is not run, here or anywhere. as_printed: it is also run without the changes with ``-m slow``; slow: it
    is run then alone, with the changes.
    """

    add: str = ""
    swap: Mapping[str, str] = field(default_factory=dict)
    status: tuple[int, ...] = (0,)
    says: str = ""
    skip: str = ""
    as_printed: bool = False
    slow: bool = False


# What a cell would do. This machine's constants are measured first, if no test has done it yet.
PLAN = "dry_run=true"
ONE = f"system=transformers {PLAN}"
# Tasks that need no package.
WORDS = {
    "tasks=ci": "tasks=copying_words",
    "tasks=helm": "tasks=copying_words",
    "--tasks lambada": "--tasks copying_words",
}
TASKS = "--tasks copying_words"
HELM = (
    "python -m flexgen_bench accuracy model=smollm2-135m tasks=helm reference=yardstick 'mode=[bf16,w8,w4,w4-mse,"
    "w4-outputs,w4g32,w4g128,w3,kv8,kv4,w4kv4,w4kv4-sparse,q8_0,q4_0,q4_k_m,mxfp4]'"
)
LM_EVAL = "--include_path ~/.cache/flexgen-bench/accuracy/lm_eval"
BATCH = 'echo \'{"prompt": "Two and two", "max_tokens": 3}\' > requests.jsonl; rm -f answers.jsonl*; python -m'
TABLE: dict[str, How] = {
    # docs/guides
    "python -m flexgen_bench batch requests.jsonl -o answers.jsonl model=smollm2": How(
        swap={"python -m": BATCH}, says="1 answered", slow=True
    ),
    "python -m flexgen_bench batch requests.jsonl -o answers.jsonl model=smollm2 --plan": How(
        swap={"python -m": BATCH}, says="1 requests", slow=True
    ),
    "python -m flexgen_bench batch requests.jsonl -o part-2.jsonl model=smollm2 --shard 2/8": How(
        swap={"python -m": BATCH}, says="shard 2/8"
    ),
    "python -m flexgen_bench batch requests.jsonl -o answers.jsonl model=smollm2 ranks=2": How(
        swap={"python -m": BATCH}, says="1 answered", slow=True
    ),
    "python -m flexgen_bench model=opt-125m system=flexgen gpu=cpu gpu.count=2": How(PLAN, says="opt-125m", slow=True),
    "python -m flexgen_bench model=opt-125m system=flexgen gpu=cpu gpu.tensor_parallel=2": How(
        PLAN, says="opt-125m", slow=True
    ),
    "python -m flexgen_bench chat model=smollm2": How("max_tokens=4 <<< 'Say yes.'", says="tokens of context"),
    "python -m flexgen_bench chat --help": How(says="Ctrl-C"),
    "pip install 'flexgen-bench[serve]'": How(skip="installs; the environment of the tests was made so"),
    "python -m flexgen_bench serve model=smollm2": How("--help", says="answered at once", swap={" model=smollm2": ""}),
    "python -m flexgen_bench serve --help": How(says="answered at once"),
    # README, docs/quickstart.md, CONTRIBUTING
    "make install && . .venv/bin/activate": How(
        swap={"make install && .": "make -n install #"}, says="install.py bench"
    ),
    "make test": How("-n", says="install.py test"),
    ".venv/bin/pre-commit install": How(skip="writes into the checkout's git folder"),
    "make bench": How("-n", says="install.py bench"),
    "FLEXGEN_BENCH_TORCH='torch==2.13.0' make bench": How("-n", says="install.py bench"),
    "pip install -c constraints.txt -e '.[baselines,tracking]'": How(
        skip="installs; the environment of the tests was made so"
    ),
    # docs/guides/measure.md: on a GPU, and docs/notes/gpu_check.md
    "scripts/gpu_check.sh": How(skip=GPU),
    "scripts/gpu_check.sh --list": How(says="environment"),
    "scripts/gpu_check.sh environment tests": How(skip=GPU),
    "scripts/gpu_check.sh --for 590": How(skip=GPU),
    "scripts/gpu_check.sh --again rates": How(skip=GPU),
    "WHEELS=wheels scripts/gpu_check.sh": How(skip=GPU),
    "WHEELS=wheels scripts/gpu_check.sh --budget 840": How(skip=GPU),
    "scripts/gpu_check.sh --budget 840 --quick": How(skip="tests/machine/test_gpu_check.py runs it"),
    # docs/notes/recast.md
    "python scripts/recast_smollm2.py mixtral /tmp/recast-mixtral --experts 4": How(
        skip="tests/models/test_recast_weights.py recasts"
    ),
    "python -m flexgen_bench accuracy model=/tmp/recast-mixtral tasks=[lambada,copying_lookup] mode=w4 limit=12 "
    "dtype=bfloat16": How(skip="takes minutes, on a model that another command makes"),
    "pip wheel --no-deps -w wheels 'hydra-core>=1.3.5,<1.4' 'omegaconf>=2.3,<2.4' 'antlr4-python3-runtime==4.9.3' "
    "deepspeed hjson flexgen==0.1.8 attrs": How(skip="downloads and builds wheels for another machine"),
    "pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d wheels "
    "pydantic "
    "pydantic-core": How(skip="downloads wheels for another machine"),
    "python -m flexgen_bench suite=gpu16 cell=opt-30b": How(PLAN, status=(0, 1, 2), says="opt-30b"),
    # README, docs/guides/plan.md
    "python -m flexgen_bench model=opt-30b gpu=t4": How("system=accelerate", says="SIMULATED", as_printed=True),
    "python -m flexgen_bench plan model=opt-1.3b system=flexgen": How(says="policy", slow=True),
    # docs/guides/measure.md, checkpoints.md, calibrate.md, paper_tables.md, reference/command_line.md
    "python -m flexgen_bench --version": How(says="flexgen-bench "),
    "python -m flexgen_bench calibrate --quick": How("--help", says="about 20 seconds", as_printed=True),
    "python -m flexgen_bench calibrate": How("--help", says="about 20 seconds"),
    "python -m flexgen_bench calibrate --out conf-of-mine/gpu/box.yaml": How("--help", says="FILE.yaml"),
    "python -m flexgen_bench page": How("--tables none", says="page/index.html"),
    "python -m flexgen_bench page results ~/h100/results --out shown": How(
        "--tables none", swap={"~/h100/results ": ""}, says="shown/index.html"
    ),
    "python -m flexgen_bench page --live": How("--help", says="127.0.0.1"),
    "python -m flexgen_bench report --tables t2,t4 --no-simulation": How(says="reports/paper"),
    "python -m flexgen_bench --help": How(says="Typical commands"),
    "python -m flexgen_bench model=opt-1.3b workload=512-32": How(ONE, says="512 + 32 tokens"),
    "python -m flexgen_bench model=opt-1.3b weights=hub": How(ONE, says="hub weights"),
    "python -m flexgen_bench model=opt-6.7b gpu=cpu gpu.cpu_memory=4GiB": How(ONE, status=(1,), says="4.00 GiB"),
    "python -m flexgen_bench model=opt-1.3b system=flexgen policy=half-disk policy.prefetch=3": How(
        PLAN, says="prefetch 3"
    ),
    "python -m flexgen_bench model=opt-1.3b system=accelerate system.options.offload=disk": How(
        PLAN, says="offload=disk"
    ),
    "python -m flexgen_bench -m model=opt-125m,opt-1.3b": How(ONE, says="opt-125m"),
    "python -m flexgen_bench suite=disk": How(PLAN, status=(0, 1), says="opt-"),
    "python -m flexgen_bench plan model=opt-6.7b": How("system=transformers", status=(0, 1), says="opt-6.7b"),
    "python -m flexgen_bench model=opt-125m tracker=wandb": How(ONE, says="opt-125m"),
    # docs/guides/dashboards.md
    "pip install -e '.[dashboard]'": How(skip="installs; the environment of the tests was made so"),
    "python -m flexgen_bench dashboard --project flexgen-bench": How(says="Section: Throughput"),
    "python -m flexgen_bench model=llama-2-7b weights=path location=/my/checkpoint": How(
        ONE, swap={"location=/my/checkpoint": "'location=my checkpoint'"}, status=(0, 1), says="llama-2-7b"
    ),
    "python -m flexgen_bench trace latest": How(says="trace.json"),
    "python -m flexgen_bench picture all": How(swap={"all": "memory"}, says="pictures/memory--opt-1.3b"),
    "python -m flexgen_bench trace f3869f1cd3c4138b": How(says="MEASURED"),
    # docs/notes/ladder.md
    "python -m flexgen_bench suite=ladder": How(skip=LADDER),
    "python -m flexgen_bench suite=ladder cell=16bit-50": How(skip=LADDER),
    "python -m flexgen_bench suite=ladder measure.repetitions=3": How(skip=LADDER),
    "python -m flexgen_bench suite=ladder model=qwen3-0.6b": How(skip=LADDER),
    "python -m flexgen_bench suite=ladder_gpu": How(skip=LADDER),
    "python -m flexgen_bench suite=ladder_tiny": How(skip=LADDER),
    # docs/guides/hosts.md
    "python -m flexgen_bench suite=default shard=1/2": How(PLAN, status=(0, 1), says="smollm2"),
    "python -m flexgen_bench suite=default shard=2/2": How(PLAN, status=(0, 1), says="opt-1.3b"),
    "pip install 'flexgen-bench[launchers]'": How(skip="installs; the environment of the tests was made so"),
    "python -m flexgen_bench -m model=opt-1.3b,opt-6.7b hydra/launcher=submitit_slurm hydra.sweep.dir=sweeps "
    "hydra.launcher.partition=gpu hydra.launcher.gpus_per_node=1 hydra.launcher.timeout_min=120": How(skip=SLURM),
    "python -m flexgen_bench -m suite=default shard=1/2,2/2 hydra/launcher=submitit_slurm hydra.sweep.dir=sweeps "
    "hydra.launcher.exclusive=true": How(skip=SLURM),
    # docs/guides/compare.md
    "python -m flexgen_bench compare A B": How(swap={"A B": "results results"}, says="95 % intervals"),
    "python -m flexgen_bench compare main HEAD": How(skip="tests/compare makes two commits to compare"),
    "python -m flexgen_bench compare results other-machine/results": How(
        swap={"other-machine/": ""}, says="A: results"
    ),
    "python -m flexgen_bench compare one.json other.json": How(skip="tests/compare compares two records"),
    "python -m flexgen_bench compare main HEAD --rerun 5": How(skip="measures for minutes"),
    "python -m flexgen_bench compare main . --rerun 5 -- suite=tiny system=flexgen": How(skip="measures for minutes"),
    # docs/guides/accuracy.md, docs/notes/accuracy*.md
    "pip install -c constraints.txt -e '.[accuracy]'": How(skip="installs; the environment of the tests was made so"),
    "pip install -e '.[accuracy]'": How(skip="installs; the environment of the tests was made so"),
    "python -m flexgen_bench fetch smollm2 accuracy": How(TASKS, says="copying_words: 503 rows", as_printed=True),
    "python -m flexgen_bench fetch accuracy": How(TASKS, says="copying_words: 503 rows"),
    "python -m flexgen_bench fetch accuracy --tasks ci": How(
        swap={"--tasks ci": TASKS}, says="copying_words: 503 rows"
    ),
    "python -m flexgen_bench fetch accuracy --packages FOLDER": How(
        TASKS, swap={"FOLDER": "."}, says="copying_words: 503 rows"
    ),
    "python -m flexgen_bench accuracy model=smollm2-135m tasks=ci mode=w4": How(
        "dry_run=true", swap=WORDS, says="copying_words: 150 items", as_printed=True
    ),
    "python -m flexgen_bench accuracy model=smollm2-135m tasks=helm 'mode=[w8,w4,w3,kv4,w4kv4]' "
    "reference=yardstick": How("dry_run=true", swap=WORDS, says="yardstick, w3"),
    "python -m flexgen_bench accuracy model=smollm2-135m tasks=ci mode=w4 tracker=wandb": How(
        "dry_run=true", swap=WORDS, says="copying_words: 150 items"
    ),
    "python -m flexgen_bench accuracy model=smollm2-135m tasks=helm limit=100 "
    "'mode=[w4-mse,kv4,sparse,w4kv4,q8_0,q4_0,q4_k_m,mxfp4]'": How("dry_run=true", swap=WORDS, says="mxfp4"),
    HELM: How("dry_run=true", swap=WORDS, says="w4kv4-sparse"),
    "python -m flexgen_bench accuracy model=smollm2-135m tasks=helm mode=exact reference=transformers": How(
        "dry_run=true", swap=WORDS, says="transformers, exact"
    ),
    "python -m flexgen_bench accuracy model=opt-4m tasks=king_james_text 'mode=[w8,w4,w3,kv4,w4kv4,w4kv4-sparse]' "
    "reference=yardstick": How(skip="opt-4m is trained first (scripts/train_small_opt.py, minutes)"),
    "python -m flexgen_bench report": How("--tables none", says="reports/index.md", as_printed=True),
    "python -m flexgen_bench lm-eval --model flexgen --model_args model=smollm2-135m,weights=4 --tasks lambada "
    f"{LM_EVAL}": How("--limit 1", swap=WORDS, says="copying_words", slow=True),
    "python -m flexgen_bench lm-eval --model flexgen --model_args "
    "model=smollm2-135m,weights=4,weights_group=64,kv_cache=4,value_share=0.1,"
    f"policy=all-cpu,dtype=float32 --tasks lambada {LM_EVAL} --use_cache answers": How(
        "--limit 1", swap=WORDS, says="copying_words", slow=True
    ),
    f"lm_eval --model hf --model_args pretrained=... --tasks lambada,flexgen_table9 {LM_EVAL} --limit 500": How(
        skip="pretrained=... is yours to name; tests/accuracy/test_accuracy_fetch.py runs lm-eval on that folder"
    ),
}
LANGUAGES = ("sh", "python", "yaml", "text")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, smollm2: object, shared_cache: Path) -> Path:
    """A home with nothing in its cache but what is downloaded or made once for all tests (the model, this machine's
    constants), and in it a checkout."""
    home = tmp_path_factory.mktemp("home")
    cache, checkout = home / ".cache" / "flexgen-bench", home / "checkout"
    cache.mkdir(parents=True)
    for name in ("packages", "checkpoints", "calibration"):
        (shared_cache / name).mkdir(exist_ok=True)
        (cache / name).symlink_to(shared_cache / name)
    checkout.mkdir()
    for name in (
        "Makefile",
        "README.md",
        "scripts",
        "constraints.txt",
        "pyproject.toml",
        "flexgen_bench",
        "conf",
        "baselines",
    ):
        (checkout / name).symlink_to(ROOT / name)
    subprocess.run(["cp", "-r", str(ROOT / "results"), str(checkout)], check=True)
    (checkout / "my checkpoint").mkdir()
    return checkout


def run(command: str, place: Path, limit_s: int) -> subprocess.CompletedProcess[str]:
    """As a person types it into bash, with the interpreter of the tests as ``python``."""
    bin_ = Path(sys.executable).parent
    environment = os.environ | {
        "HOME": str(place.parent),
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(place),
    }
    for name in ("FLEXGEN_BENCH_CACHE", "HYDRA_FULL_ERROR"):
        environment.pop(name, None)
    return subprocess.run(
        ["bash", "-c", command],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=limit_s,
    )


def changed(command: str, how: How) -> str:
    for old, new in how.swap.items():
        command = command.replace(old, new)
    return f"{command} {how.add}".strip()


def is_right(answer: subprocess.CompletedProcess[str], how: How) -> None:
    told = answer.stdout + answer.stderr
    assert answer.returncode in how.status, told[-3000:]
    assert "Traceback" not in told, told[-3000:]
    assert how.says in told, told[-3000:]


def names(wanted: dict[str, How]) -> list[str]:
    return [command[:90] for command in wanted]


def test_every_command_is_in_the_table() -> None:
    shown = commands()
    assert len(shown) > 30
    unknown = [f"{file}: {command}" for file, command in shown if command not in TABLE]
    assert not unknown, "new commands: say in TABLE how each is run"
    gone = set(TABLE) - {command for _, command in shown}
    assert not gone, "no longer shown anywhere"


def test_every_block_says_what_it_is() -> None:
    """A command in a block without a language would be found by nobody."""
    unknown = [f"{b.file}: {b.language!r}" for b in blocks() if b.language not in LANGUAGES]
    assert not unknown
    hidden = [b for b in blocks() if b.language == "text" and "\npython -m" in f"\n{b.text}"]
    assert not hidden


QUICK = {command: how for command, how in TABLE.items() if not how.skip and not how.slow}


@pytest.mark.parametrize("command", QUICK, ids=names(QUICK))
def test_command(command: str, place: Path) -> None:
    is_right(run(changed(command, QUICK[command]), place, 200), QUICK[command])


LONG = {command: how for command, how in TABLE.items() if how.slow or how.as_printed}


@pytest.mark.slow
@pytest.mark.parametrize("command", LONG, ids=names(LONG))
def test_long_command(command: str, place: Path, request: pytest.FixtureRequest) -> None:
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("minutes; run with -m slow")
    how = LONG[command]
    is_right(run(changed(command, how) if how.slow else command, place, 1800), how if how.slow else How())


PYTHON = [block for block in blocks() if block.language == "python"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.file)
def test_python(block: object, place: Path, tmp_path: Path) -> None:
    """With a small model in place of OPT-1.3B, and a folder that everybody can write to."""
    text = block.text.replace('"opt-1.3b"', '"opt-125m"').replace("/mnt/nvme/spill", str(tmp_path))
    (tmp_path / "shown.py").write_text(text)
    answer = run(f"python {tmp_path / 'shown.py'}", place, 300)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert answer.stdout.strip(), "the texts of two prompts"
