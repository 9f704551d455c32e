"""``policy=auto`` chosen in a process of its own, so that nothing of the search stays in the memory of the one that is
going to run.

A search leaves tens of megabytes behind (scipy, HiGHS, what was played). An engine under a memory cap would pay for
them with resident weights.
``python -m flexgen_bench.planner.choose`` reads a question as JSON on its standard input and writes an answer to its
standard output.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.errors import DoesNotFit, UserError
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.models.packing import pack
from flexgen_bench.models.registry import family
from flexgen_bench.planner.auto_policy import auto_policy
from flexgen_bench.planner.default_policy import default_policy
from flexgen_bench.schedule.sequence_groups import Request, worst_of

_log = logging.getLogger("flexgen_bench.stage")


@dataclass(frozen=True)
class PolicyQuestion:
    """A job to choose a policy for, as it travels between processes.

    request: what it is planned for (``worst_of`` its requests); count: how many. available: bytes a plan may use, per
    tier. lossy: how results may be changed; its compression of weights is the one they are packed with. block_size: the
    most sequences per block; None: any number.
    scored_rows: rows of logits that a scoring job wants at once. max_latency_s: of a block, from its start to its last
    token.
    """

    shape: ModelShape
    dtype: DType
    hardware: HardwareProfile
    request: Request
    count: int
    available: Mapping[Tier, int]
    lossy: Lossy = EXACT
    block_size: int | None = None
    scored_rows: int = 0
    max_latency_s: float | None = None

    @staticmethod
    def about(requests: Sequence[Request], **more: Any) -> PolicyQuestion:
        """The question for a job of these requests; ``more``: the other fields."""
        return PolicyQuestion(request=worst_of(requests), count=len(requests), **more)

    def answer(self) -> Policy:
        """The policy, searched for in this process. Raises DoesNotFit, and UserError for rates that lack what the job
        needs."""
        return auto_policy(**self._asked(), max_latency_s=self.max_latency_s)

    def by_rule(self) -> Policy:
        """The plain rule's policy: no search, no rates. Raises DoesNotFit."""
        return default_policy(**self._asked())

    def _asked(self) -> dict[str, Any]:
        inventory = family(self.shape.family).inventory(self.shape)
        return {
            "shape": self.shape,
            "packed": pack(self.shape, inventory, self.dtype, self.lossy.weights),
            "dtype": self.dtype,
            "hardware": self.hardware,
            "requests": [self.request] * self.count,
            "available": self.available,
            "block_size": self.block_size,
            "lossy": self.lossy,
            "scored_rows": self.scored_rows,
        }


def choose(question: PolicyQuestion) -> Policy:
    """The policy of a job: where rates are known, searched for in a process of its own, else the rule's.

    A search that finds nothing, or whose process dies (a warning says of what), leaves it to the rule. Raises
    DoesNotFit if that finds nothing either, and UserError for rates that lack what the job needs and for a latency that
    nothing keeps to.
    """
    if question.hardware.rates is None:
        return question.answer()  # the rule's, if it is free to take it
    _log.info("choosing a policy")
    try:
        found = _ask(question)
    except _NoAnswer as reason:
        if question.max_latency_s is not None:
            raise UserError(
                "policy.max_latency_s",
                question.max_latency_s,
                f"left out here: {reason}",
                "The plain rule's policy, which needs no search, knows of no time.",
            ) from reason
        _log.warning(
            "no policy was searched for: %s. A plain rule's policy is used; it may be slower. A policy that is given needs no search.",
            reason,
        )
        return question.by_rule()
    return question.by_rule() if found is None else found


class _NoAnswer(RuntimeError):
    """The process that was asked has died, and of what."""


def _ask(question: PolicyQuestion) -> Policy | None:
    """What the other process finds; None: nothing fits. Raises UserError that it raised, and _NoAnswer. However this is
    left, it has ended."""
    try:
        with subprocess.Popen(
            _command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as child:
            try:
                out, err = child.communicate(json.dumps(to_json(question)))
            except BaseException:
                child.kill()
                child.wait()
                raise
    except OSError as error:  # no memory for another process, say
        raise _NoAnswer(f"its process did not start ({error.strerror or error})") from error
    if child.returncode != 0:
        raise _NoAnswer(_ending(child.returncode, err))
    try:
        answer = json.loads(out)
        policy, refused = answer["policy"], answer["refused"]
        found = None if policy is None else from_json(Policy, policy, "policy")
    except (ValueError, TypeError, KeyError) as error:
        raise _NoAnswer(f"its process gave no answer, but {out[:80]!r}") from error
    if refused is not None:
        raise UserError(**refused)
    return found


def _command() -> list[str]:
    return [sys.executable, "-m", "flexgen_bench.planner.choose"]


def _ending(status: int, said: str) -> str:
    if status == -signal.SIGKILL:
        return "its process was killed, most likely as memory ran out"
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    lines = said.strip().splitlines()
    return f"its process ended with exit status {status} ({lines[-1] if lines else 'no message'})"


def main() -> None:
    """The other process: a question on standard input, its answer on standard output."""
    answer: dict[str, Any] = {"policy": None, "refused": None}
    try:
        answer["policy"] = to_json(from_json(PolicyQuestion, json.load(sys.stdin), "question").answer())
    except DoesNotFit:
        pass  # who asks tries the rule, which says what is missing
    except UserError as error:
        value = error.value if isinstance(error.value, str | int | float) else str(error.value)
        answer["refused"] = {"field": error.field, "value": value, "allowed": error.allowed, "action": error.action}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
