"""What tasks cost, in tokens of a model's tokenizer: python scripts/accuracy_budget.py TOKENIZER_FOLDER [--limit N]
[TASK_OR_SET ...]

tokens: of all requests, each by itself. distinct: what is left if shared beginnings (examples, the context of several
choices) are computed once. generated: at most. gold cut: items whose right answer is longer than what may be generated.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from flexgen_bench.accuracy.data.tasks import load_tasks
from flexgen_bench.config.paths import default_cache_dir

Encode = Callable[[str], list[int]]


@dataclass
class Cost:
    items: int = 0
    requests: int = 0
    tokens: int = 0
    distinct: int = 0
    generated: int = 0
    longest: int = 0
    gold_cut: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("tasks", nargs="*", default=["helm"])
    options = parser.parse_intermixed_args()
    logging.disable(logging.WARNING)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids

    print(f"| task | {' | '.join(f.replace('_', ' ') for f in Cost.__dataclass_fields__)} |\n|---|{'---|' * 7}")
    total = Cost()
    for name, task in load_tasks(options.tasks, options.limit, default_cache_dir()).items():
        cost = cost_of(task, encode)
        _print(name, cost)
        total = Cost(*(a + b for a, b in zip(astuple(total), astuple(cost), strict=True)))
    total.longest = 0
    _print("sum", total)


def cost_of(task: Any, encode: Encode) -> Cost:
    """A task's cost. Its requests are built here."""
    task.set_fewshot_seed(0)
    with contextlib.redirect_stderr(io.StringIO()):
        task.build_all_requests()
    cost = Cost(items=len(task.eval_docs), requests=len(task.instances))
    sequences = []
    for request in task.instances:
        *context, last = request.args
        generates = isinstance(last, dict)
        ids = [t for text in (*context, *([] if generates else [last])) for t in encode(text)]
        most = last["max_gen_toks"] if generates else 0
        cost.tokens += len(ids)
        cost.generated += most
        cost.longest = max(cost.longest, len(ids) + most)
        if generates:
            gold = task.doc_to_target(request.doc)
            cost.gold_cut += len(encode(gold if isinstance(gold, str) else gold[0])) > most
        sequences.append(ids)
    cost.distinct = distinct(sequences)
    return cost


def distinct(sequences: Iterable[Sequence[int]]) -> int:
    """Nodes of the prefix tree of the sequences."""
    count = 0
    before: tuple[int, ...] = ()
    for now in sorted(tuple(s) for s in sequences):
        shared = 0
        while shared < min(len(before), len(now)) and before[shared] == now[shared]:
            shared += 1
        count, before = count + len(now) - shared, now
    return count


def _print(name: str, cost: Cost) -> None:
    print(f"| {name} | {' | '.join(f'{v:,}' for v in astuple(cost))} |", flush=True)


if __name__ == "__main__":
    main()
