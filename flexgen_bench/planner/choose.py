"""``policy=auto`` chosen in a process of its own, so that nothing of the search stays in the memory of the one that is
going to run.

A search leaves tens of megabytes behind (scipy, HiGHS, what was simulated). An engine under a memory cap would pay for
them with resident weights. ``python -m flexgen_bench.planner.choose`` reads a search space as JSON on its standard
input and writes a policy to its standard output.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from typing import Any

from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.errors import DoesNotFit, UserError
from flexgen_bench.core.policy import Policy
from flexgen_bench.planner.auto_policy import auto_policy
from flexgen_bench.planner.default_policy import default_policy
from flexgen_bench.planner.search_space import SearchSpace

_log = logging.getLogger("flexgen_bench.stage")


def choose(space: SearchSpace) -> Policy:
    """The policy of a job: where rates are known, searched for in a process of its own, else the heuristic's.

    A search that finds nothing, or whose process dies (a warning says of what), leaves it to the heuristic. Raises
    DoesNotFit if that finds nothing either, and UserError for rates that lack what the job needs and for a latency that
    nothing keeps to.
    """
    if space.job.hardware.rates is None:
        return auto_policy(space)  # the heuristic's, if it is free to take it
    _log.info("choosing a policy")
    try:
        policy = _searched(space)
    except _SearchFailed as reason:
        if space.job.max_latency_s is not None:
            raise UserError(
                "policy.max_latency_s",
                space.job.max_latency_s,
                f"left out here: {reason}",
                "The plain rule's policy, which needs no search, knows of no time.",
            ) from reason
        _log.warning(
            "no policy was searched for: %s. A plain rule's policy is used; it may be slower. A policy that is given "
            "needs no search.",
            reason,
        )
        return default_policy(space)
    return default_policy(space) if policy is None else policy


class _SearchFailed(RuntimeError):
    """The process that was asked has died, and of what."""


def _searched(space: SearchSpace) -> Policy | None:
    """What the other process finds; None: nothing fits. Raises UserError that it raised, and _SearchFailed. However
    this is left, it has ended."""
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
                out, err = child.communicate(json.dumps(to_json(space)))
            except BaseException:
                child.kill()
                child.wait()
                raise
    except OSError as error:  # no memory for another process, say
        raise _SearchFailed(f"its process did not start ({error.strerror or error})") from error
    if child.returncode != 0:
        raise _SearchFailed(_ending(child.returncode, err))
    try:
        reply = json.loads(out)
        refused = reply["refused"]
        policy = None if reply["policy"] is None else from_json(Policy, reply["policy"], "policy")
    except (ValueError, TypeError, KeyError) as error:
        raise _SearchFailed(f"its process gave no answer, but {out[:80]!r}") from error
    if refused is not None:
        raise UserError(**refused)
    return policy


def _command() -> list[str]:
    return [sys.executable, "-m", "flexgen_bench.planner.choose"]


def _ending(status: int, stderr: str) -> str:
    if status == -signal.SIGKILL:
        return "its process was killed, most likely as memory ran out"
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    lines = stderr.strip().splitlines()
    return f"its process ended with exit status {status} ({lines[-1] if lines else 'no message'})"


def main() -> None:
    """The other process: a search space on standard input, the policy or a refusal on standard output."""
    answer: dict[str, Any] = {"policy": None, "refused": None}
    try:
        answer["policy"] = to_json(auto_policy(from_json(SearchSpace, json.load(sys.stdin), "space")))
    except DoesNotFit:
        pass  # who asks tries the heuristic, which says what is missing
    except UserError as error:
        value = error.value if isinstance(error.value, str | int | float) else str(error.value)
        answer["refused"] = {"field": error.field, "value": value, "allowed": error.allowed, "action": error.action}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
