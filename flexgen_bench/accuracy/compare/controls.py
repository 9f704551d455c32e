"""Controls that must fail when something is wrong with the measurement itself: compression silently off, a wrong grid,
an impossible order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flexgen_bench.accuracy.compare.compare import ALPHA, ModeComparison
from flexgen_bench.accuracy.compare.statistics import mean_draws, mean_of
from flexgen_bench.core.accuracy import ModeRecord
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.digits import fixed

# Relative weight error of 4 bits in groups of 64, whatever the model (docs/notes/accuracy.md): outside, the grid is not
# what it is said to be.
BAND = (0.05, 0.12)
# Below this share of the least error that their bits give on other weights, weights lie on the grid already.
ON_GRID = 0.2
# Added log-loss of the engine, of that of a plain rounding on the same weights. Below LEAST bits per byte the ratio is
# that of two noises.
MOST_OF_RTN = 1.02
LEAST_ADDED = 0.002


@dataclass(frozen=True)
class Finding:
    """fails: the run must not pass for a result. Otherwise a warning that belongs beside the mode's numbers."""

    mode: str
    name: str
    text: str
    fails: bool


@dataclass(frozen=True)
class Seen:
    """What the controls look at for one mode. comparison: with the exact mode; rtn: the round-to-nearest baseline's
    with its exact mode. weight_format: the published one that the weights were rounded to."""

    mode: str
    lossy: Lossy
    comparison: ModeComparison | None = None
    numbers: ModeRecord | None = None
    rtn: ModeComparison | None = None
    weight_format: str | None = None

    @property
    def what(self) -> str:
        return self.weight_format or str(self.lossy)


def check(seen: Sequence[Seen]) -> list[Finding]:
    """Everything that is wrong, or worth a warning, with a run's modes."""
    findings = [finding for one in seen for finding in _of_mode(one)]
    return findings + _order({one.mode: one for one in seen})


def on_grid(numbers: ModeRecord | None) -> bool:
    """Whether the model's own weights lie on the mode's grid: an independent quantizer changes next to nothing
    either."""
    weights = None if numbers is None else numbers.subject.changes.weights
    if numbers is None or weights is None or numbers.grid_error is None:
        return False
    # A step is the range of a group over (levels - 1); so is, on other weights, the error.
    return numbers.grid_error < ON_GRID * BAND[0] * 15 / (weights.levels - 1)


def _of_mode(one: Seen) -> list[Finding]:
    findings = []
    trap = on_grid(one.numbers)
    if trap:
        assert one.numbers is not None
        assert one.numbers.grid_error is not None
        findings.append(
            Finding(
                one.mode,
                "weights on the grid",
                f"this model's weights lie on the grid of {one.lossy.weights} already (an independent quantizer "
                "changes them by "
                f"{fixed(one.numbers.grid_error, 4)}, too): nothing is lost by construction, which says nothing about "
                "other models.",
                False,
            )
        )
    only_weights = one.lossy.kv_cache is None and one.lossy.value_share == 1
    if one.comparison is not None and one.comparison.tasks and (one.weight_format or not one.lossy.is_exact):
        same = all(task.identical for task in one.comparison.tasks)
        if same and not (trap and only_weights):
            findings.append(
                Finding(
                    one.mode,
                    "compression silently off",
                    f"every log-likelihood of {sum(t.n for t in one.comparison.tasks)} items is that of the "
                    "uncompressed model, digit for digit: "
                    f"{one.what} has not been applied.",
                    True,
                )
            )
    if one.numbers is not None and one.lossy.weights is not None:
        findings += _weights(one, one.lossy.weights, one.numbers, trap)
    if one.numbers is not None and one.weight_format is not None and not one.numbers.weight_error:
        text = f"no weight of the layers was changed, although the mode is {one.weight_format}."
        findings.append(Finding(one.mode, "compression silently off", text, True))
    findings += _against_rtn(one, trap)
    return findings


def _weights(one: Seen, compression: Compression, numbers: ModeRecord, trap: bool) -> list[Finding]:
    error = numbers.weight_error
    if error is None:
        text = f"the packed weights hold no compressed tensor, although the mode is {one.lossy}."
        return [Finding(one.mode, "compression silently off", text, True)]
    if trap:
        return []
    if error == 0:
        text = f"the packed weights are the checkpoint's own, bit for bit: {compression} has not been applied."
        return [Finding(one.mode, "compression silently off", text, True)]
    usual = (compression.bits, compression.group_size) == (4, Compression.group_size)
    if usual and not BAND[0] <= error <= BAND[1]:
        text = (
            f"relative error {fixed(error, 4)} of the weights; 4 bits in groups of 64 give {BAND[0]} to {BAND[1]} on "
            "trained weights."
        )
        return [Finding(one.mode, "weight error out of band", text, True)]
    return []


def _order(seen: Mapping[str, Seen]) -> list[Finding]:
    """Fewer bits on the same grid lose more."""
    findings = []
    for one in seen.values():
        for other in seen.values():
            a, b = one.lossy, other.lossy
            if a.weights is None or b.weights is None or a.weights.bits >= b.weights.bits:
                continue
            if _shape(a) != _shape(b) or on_grid(other.numbers):
                continue
            text = _not_worse(one, other)
            if text and (a.weights.bits, b.weights.bits) == (3, 4):
                findings.append(Finding(one.mode, "3-bit not worse than 4-bit", text, True))
            elif text:
                name = "fewer bits not worse"
                findings.append(Finding(one.mode, name, text, False))
    return findings


def _not_worse(coarse: Seen, fine: Seen) -> str:
    """Why the coarser mode does not look worse; empty if it does, or nothing can be said."""
    if coarse.numbers is not None and fine.numbers is not None:
        a, b = coarse.numbers.weight_error, fine.numbers.weight_error
        if a is not None and b is not None and a <= b:
            return f"weight error {fixed(a, 4)} of {coarse.mode} is not above {fixed(b, 4)} of {fine.mode}."
    if coarse.comparison is None or fine.comparison is None:
        return ""
    first, second = coarse.comparison.bits, fine.comparison.bits
    shared = {t.task for t in coarse.comparison.tasks} == {t.task for t in fine.comparison.tasks}
    if shared and first is not None and second is not None and first.value <= second.value:
        return (
            f"added log-loss {fixed(first.value, 4)} bits per byte of {coarse.mode} is not above "
            f"{fixed(second.value, 4)} of {fine.mode}."
        )
    return ""


def _shape(lossy: Lossy) -> tuple[object, ...]:
    """Everything but the weights' bits."""
    assert lossy.weights is not None
    rest = {k: v for k, v in to_json(lossy.weights).items() if k != "bits"}
    return tuple(sorted(rest.items())), lossy.kv_cache, lossy.value_share


def _against_rtn(one: Seen, trap: bool) -> list[Finding]:
    """Fails where the ratio is above the bar beyond doubt; a warning where it may be chance."""
    if one.rtn is None or one.comparison is None or trap:
        return []
    ours = {t.task: t.bits_difference for t in one.comparison.tasks if t.bits_difference}
    theirs = {t.task: t.bits_difference for t in one.rtn.tasks if t.bits_difference}
    shared = sorted(set(ours) & set(theirs))
    if not shared:
        return []
    mine, rounded = (mean_of([of[name] for name in shared]).value for of in (ours, theirs))
    if rounded < LEAST_ADDED or mine <= MOST_OF_RTN * rounded:
        return []
    # The same items and seed give the same resamples, so draws of both belong together.
    excess = mean_draws([ours[name].draws - MOST_OF_RTN * theirs[name].draws for name in shared])
    certain = bool(np.quantile(excess, ALPHA) > 0)
    text = (
        f"added log-loss {fixed(mine, 5)} bits per byte is {fixed(mine / rounded, 3)} times the {fixed(rounded, 5)} of "
        "plain rounding to the same grid "
        f"(bar: {MOST_OF_RTN}); {'more than chance explains' if certain else 'chance may explain it'}."
    )
    return [Finding(one.mode, "worse than the yardstick", text, certain)]
