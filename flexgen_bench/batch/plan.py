"""What a batch will take, before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from flexgen_bench.batch.inputs import Line, request_of
from flexgen_bench.batch.run import Settings
from flexgen_bench.batch.scan import Scan
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.units import format_bytes, format_seconds
from flexgen_bench.llm.llm import LLM
from flexgen_bench.requests.asked import ParsedRequest, Reader
from flexgen_bench.requests.errors import RequestError
from flexgen_bench.schedule.sequence_groups import Request

SAMPLE = 256  # lines that are looked at for the plan
_ANSWER_BYTES, _TOKEN_BYTES = 500, 5  # of a line of the output: about, beside its text, and of a token of that


def plan_text(llm: LLM, reader: Reader, lines: Iterator[Line], scanned: Scan, settings: Settings) -> str:
    """A few lines: how much work, the policy and its memory, disk, and, where the machine's rates are known, time."""
    sampled = list(_sample(reader, lines, settings))
    if not sampled:
        return f"{scanned.lines} lines, of which those looked at ask for nothing that can be answered"
    requests = [
        Request(len(prompt), sequence.params.max_tokens)
        for one in sampled
        for prompt, sequence in zip(one.prompts, one.sequences, strict=True)
    ]
    scale = scanned.lines / len(sampled)
    prompt_tokens = sum(r.prompt_len for r in requests) * scale
    new_tokens = sum(r.gen_len for r in requests) * scale
    amounts = f"{scanned.lines} requests: about {prompt_tokens:.3g} prompt tokens, at most {new_tokens:.3g} new ones"
    disk = format_bytes(scanned.lines * _ANSWER_BYTES + new_tokens * _TOKEN_BYTES)
    job = sorted(requests, key=lambda r: (r.gen_len, r.prompt_len), reverse=True)[: settings.window]
    plan = llm.plan(job)
    ranks = plan.job.slices if plan.job.stage is None else plan.job.stage.ranks
    of_each = f" of each of {ranks} ranks" if ranks > 1 else ""
    memory = ", ".join(
        f"{site} {format_bytes(sum(parts.values()))} (KV cache {format_bytes(parts.get('kv_cache', 0))})"
        for site, parts in plan.bytes.items()
        if sum(parts.values())
    )
    return "\n".join(
        [
            amounts,
            f"memory{of_each}: {memory}, planned for the largest jobs",
            f"disk: the answers take up to {disk}",
            f"time: {_time(llm, job, len(requests) * scale, ranks)}",
        ]
    )


def _time(llm: LLM, job: Sequence[Request], sequences: float, ranks: int) -> str:
    if ranks > 1:
        return f"nobody knows before the first answers: it is not predicted for {ranks} ranks"
    try:
        seconds = llm.predicted_seconds(job)
    except UserError:
        return "nobody knows before the first answers: this machine is not calibrated (flexgen-bench calibrate)"
    took = format_seconds(seconds * sequences / len(job))
    return f"at most about {took} [SIMULATED, if every answer is as long as it may be]"


def _sample(reader: Reader, lines: Iterator[Line], settings: Settings) -> Iterator[ParsedRequest]:
    for line in islice(lines, SAMPLE):
        try:
            one = request_of(line, settings.model, dict(settings.defaults))
            yield reader.read(one.url, one.body)
        except RequestError:
            continue
