"""``flexgen-bench batch in.jsonl -o out.jsonl model=...``: answer files of requests.

Exit status: 0 if every line has its answer (a bad line's says what is wrong with it), 1 if something went wrong on the
way, 2 for bad input, 130 after Ctrl-C. After any of them the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen_bench.cli.ending import status_of
from flexgen_bench.cli.model_words import check_words, divided, number, open_llm, words_help
from flexgen_bench.core.errors import CannotRun, NotFinite, StoreError, UserError
from flexgen_bench.core.folders import path_argument
from flexgen_bench.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from flexgen_bench.batch.output_file import OutputFile
    from flexgen_bench.batch.scan import Scan
    from flexgen_bench.core.shard import Shard
    from flexgen_bench.llm.llm import LLM

# Of lines that are bare prompts: what SamplingParams has, which is greedy where OpenAI's form is not.
DEFAULTS: dict[str, Any] = {"max_tokens": 16, "temperature": 0.0}
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
_ANSWER_TOKENS = 1024  # of a conversation that does not say how long its answer may be
_ALIGNED = 32  # sequences of a micro-batch

_EPILOG = f"""\
words:
{words_help()}
  {"name=":<17} how requests call the model (default: as model= does)
  {"answer_tokens=":<17} most new tokens of a request (default: what the model has positions for)
  of lines that are bare prompts: {", ".join(f"{key}=" for key in _SAMPLING)}

input:
  .jsonl     OpenAI's batch format:
             {{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {{...}}}};
             or {{"prompt": "..."}} or {{"messages": [...]}}, with fields of the body beside it
  .txt       a prompt a line
  .parquet   prompts in a --column
"""


def main(arguments: Sequence[str]) -> int:
    """The exit status."""
    interrupted = "interrupted; what is answered is kept, and the same command goes on"
    return status_of(lambda: _command(arguments), (StoreError, CannotRun, NotFinite), interrupted)


def _command(arguments: Sequence[str]) -> int:
    others, words = divided(arguments)
    return _run(_parser().parse_args(others), words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flexgen-bench batch",
        description="Answer files of requests. Every answer is on disk as soon as it is there; after a kill the same "
        "command goes on with what is missing.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", nargs="+", type=path_argument, help="files of requests")
    parser.add_argument("-o", "--output", required=True, type=path_argument, help="the file of answers (JSONL)")
    parser.add_argument(
        "--shard", default="1/1", metavar="i/n", help="answer the i-th of n parts, for several machines"
    )
    parser.add_argument("--column", default=None, help="of a parquet file, with the prompts")
    parser.add_argument("--window", type=int, default=None, help="requests that are in memory at once")
    parser.add_argument(
        "--order", choices=("input", "finished"), default="input", help="of the answers, when all are there"
    )
    parser.add_argument("--plan", action="store_true", help="only say what it will take")
    return parser


def _run(options: argparse.Namespace, words: Mapping[str, str]) -> int:
    from flexgen_bench.batch.inputs import check_inputs
    from flexgen_bench.batch.output_file import OutputFile
    from flexgen_bench.batch.scan import scan
    from flexgen_bench.core.shard import Shard
    from flexgen_bench.ranks.torchrun import Torchrun

    check_words(words, (*_SAMPLING, "name", "answer_tokens"))
    shard = Shard.parse(options.shard)
    if options.window is not None and options.window < 1:
        raise UserError("--window", options.window, "at least 1")
    SamplingParams(**_sampling(words))  # refuses now what every line would be refused for
    _answer_tokens(words)
    torchrun = Torchrun.of(os.environ)
    if torchrun is not None and torchrun.rank > 0:
        open_llm(words)  # serves rank 0, which alone reads and writes, and ends with it
    check_inputs(options.input, options.column)
    if any(_is_same(options.output, path) for path in options.input):
        raise UserError("--output", str(options.output), "another file than the input")
    scanned = scan(options.input, options.column, shard)
    if options.plan:
        with open_llm(words) as llm:
            Answering(llm, options, words, scanned).tell_plan()
        return 0
    # The output is looked at before the model is opened, which may take minutes.
    with OutputFile(options.output, _belongs_to(scanned, shard, words, options), scanned.positions) as output:
        if output.done:
            print(f"{output.done} of {scanned.lines} are answered already", file=sys.stderr, flush=True)
        if output.done < scanned.lines or torchrun is not None:  # whose other processes wait for this one's model
            with open_llm(words) as llm:
                Answering(llm, options, words, scanned).run(output)
        elif not scanned.lines:
            print(f"no line is{shard.words}: the output is empty", file=sys.stderr)
        if options.order == "input":
            output.restore_order()
    return 0


class Answering:
    """A model at work on the lines of a scan."""

    def __init__(self, llm: LLM, options: argparse.Namespace, words: Mapping[str, str], scanned: Scan) -> None:
        from flexgen_bench.batch.run import Settings
        from flexgen_bench.requests.asked import Limits, Reader

        name = words.get("name", words["model"])
        window = options.window or _window(scanned.lines)
        self._llm, self._options, self._scanned = llm, options, scanned
        self._settings = Settings(window, name, {**DEFAULTS, **_sampling(words)})
        limits = Limits(llm.shape.max_positions, _answer_tokens(words), choices=window)
        self._reader = Reader(llm.tokenizer, llm.shape, (name,), limits)
        self._rows = scanned.order()

    def tell_plan(self) -> None:
        from flexgen_bench.batch.plan import SAMPLE, plan_text
        from flexgen_bench.batch.scan import in_order

        every = max(1, len(self._rows) // SAMPLE)  # evenly from first to last
        sample = in_order(self._rows[::every], self._options.input, self._options.column)
        text = plan_text(self._llm, self._reader, sample, self._scanned, self._settings)
        print(text, file=sys.stderr, flush=True)

    def run(self, output: OutputFile) -> None:
        from flexgen_bench.batch.progress import BatchProgress, summary
        from flexgen_bench.batch.run import Batch
        from flexgen_bench.batch.scan import in_order

        self.tell_plan()
        options = self._options
        with BatchProgress(self._scanned.lines, output.done) as progress:
            batch = Batch(self._llm, self._reader, output, self._settings, progress)
            batch.run(in_order(self._rows, options.input, options.column))
        rates = self._llm.hardware.rates
        print(summary(progress, rates.price_per_hour if rates else None), file=sys.stderr)


def _belongs_to(scanned: Scan, shard: Shard, words: Mapping[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for answers to be of one job: not the policy, which changes none."""
    of_results = ("model", "name", "dtype", "weights", "weights_group", "kv_cache", "kv_cache_group", "value_share")
    return {
        "format": 1,
        "inputs": [{"name": name, "sha256": digest} for name, digest in scanned.files],
        "column": options.column,
        "shard": str(shard),
        "settings": {key: words[key] for key in sorted((*of_results, *_SAMPLING, "answer_tokens")) if key in words},
    }


def _is_same(output: Path, path: Path) -> bool:
    """Also by another name: a link."""
    return output.exists() and output.samefile(path)


def _window(lines: int) -> int:
    """A tenth of the requests, within what is worth it: whole micro-batches."""
    return min(4096, max(2 * _ALIGNED, lines // 10 // _ALIGNED * _ALIGNED))


def _sampling(words: Mapping[str, str]) -> dict[str, Any]:
    """What words say of lines that are bare prompts."""
    return {key: number(words[key]) for key in _SAMPLING if key in words}


def _answer_tokens(words: Mapping[str, str]) -> int:
    stated = words.get("answer_tokens")
    count = _ANSWER_TOKENS if stated is None else number(stated)
    if not isinstance(count, int) or count < 1:
        raise UserError("answer_tokens", stated, "an integer of at least 1")
    return count
