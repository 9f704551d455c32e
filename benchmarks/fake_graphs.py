"""CUDA graphs without CUDA: operators are written down and carried out again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from flexgen_bench.engine.graphs import Work

_LOOKS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero")


class FakeCapture:
    """As a CUDA graph: recording carries out nothing that can be seen afterwards; launching it finds its inputs, and
    leaves its outputs, where they were when it was recorded. What looks at a value cannot be recorded.

    fails_at: number of the recording that the device refuses. launches: of all graphs. recorded: operators of each.
    """

    def __init__(self, fails_at: int = -1) -> None:
        self._fails_at = fails_at
        self.launches = self.settled = 0
        self.recorded: list[int] = []

    def record(self, work: Work) -> Work:
        if len(self.recorded) == self._fails_at:
            raise RuntimeError("operation not permitted when stream is capturing")
        script: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        with _disable_current_modes(), _Recording(script):
            work()
        self.recorded.append(len(script))

        def replay() -> None:
            self.launches += 1
            with _disable_current_modes():
                for function, args, kwargs, made in script:
                    again = function(*args, **kwargs)
                    for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                        if isinstance(old, Tensor) and old is not new:
                            old.copy_(new)

        return replay

    def settle(self) -> None:
        self.settled += 1


class _Recording(TorchDispatchMode):
    def __init__(self, script: list[tuple[Any, ...]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._script = script

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.removeprefix("aten::") in _LOOKS:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if written:  # not now
            self._script.append((func, args, kwargs, given[written[0]]))
            return given[written[0]]
        made = func(*args, **kwargs)
        if not _is_view(made, (*tree_leaves(args), *tree_leaves(kwargs))):
            self._script.append((func, args, kwargs, made))
        return made


def _is_view(made: Any, given: tuple[Any, ...]) -> bool:
    """Of what was given: it is there already."""
    known = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
    return all(t.untyped_storage().data_ptr() in known for t in tree_leaves(made) if isinstance(t, torch.Tensor))
