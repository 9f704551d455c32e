"""What answers "how fast would this system be there?" without running it: a system's own model of how it uses a
machine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.job import Job
from flexgen_bench.core.prediction import Prediction


class Predictor(ABC):
    """A system's performance model. One class per system; ``conf/system/<name>.yaml`` names it and states its
    constants.

    constants: the model's few physical constants by name, each explained where it is used. options: the system's own
    settings, as in ``CellSpec.system_options``; one that is None is for the predictor to choose as the system's users
    would.
    """

    def __init__(self, constants: Mapping[str, float], options: Mapping[str, Any]) -> None:
        self.constants, self.options = dict(constants), dict(options)

    @abstractmethod
    def predict(self, job: Job) -> Prediction:
        """Raises DoesNotFit where the system would run out of memory, CannotRun where it cannot do the job at all,
        UserError for constants or options that cannot be."""


def make_predictor(target: str, constants: Mapping[str, float], options: Mapping[str, Any]) -> Predictor:
    """The predictor that a configuration names, written ``module:Class``. Raises UserError for one that is not
    there."""
    module, _, name = target.partition(":")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError("system.predictor", target, "an importable module:Class") from error
    if not (isinstance(kind, type) and issubclass(kind, Predictor)):
        raise UserError("system.predictor", target, "a subclass of planner.predictor.Predictor")
    return kind(constants, options)
