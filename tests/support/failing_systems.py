"""Systems that go wrong in the ways a cell must survive. Used by the tests of the runner."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import ClassVar

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.errors import CannotRun
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.progress import Progress
from flexgen_bench.core.record import LinkUse, SystemReport
from flexgen_bench.systems.contract import Capabilities, Generation, System


class Counting(System):
    """Works: token i of a prompt is i. The base of the others."""

    capabilities: ClassVar[Capabilities] = Capabilities()

    def load(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def generate(self, prompts: Sequence[Sequence[int]], gen_len: int, progress: Progress) -> Generation:
        progress("decode", len(prompts) * gen_len, len(prompts) * gen_len)
        ids = tuple(tuple(range(gen_len)) for _ in prompts)
        return Generation(ids, prefill_s=1.0, decode_s=float(gen_len - 1))

    def report(self) -> SystemReport:
        realised = {"spins": os.environ.get("GOMP_SPINCOUNT")}
        return SystemReport(realised=realised, links={"disk_read": LinkUse(7, 0.5)}, notes=("counted",))


class Raising(Counting):
    def load(self, batch_size: int) -> None:
        raise RuntimeError("the weights are upside down")


class Crashing(Counting):
    def load(self, batch_size: int) -> None:
        ctypes.string_at(0)  # a segmentation fault


class Refusing(Counting):
    def check(self) -> None:
        raise CannotRun("needs a flux capacitor")


class Needy(Counting):
    capabilities: ClassVar[Capabilities] = Capabilities(needs=("no_such_module_anywhere",))


class Short(Counting):
    """One token too few."""

    def generate(self, prompts: Sequence[Sequence[int]], gen_len: int, progress: Progress) -> Generation:
        return super().generate(prompts, gen_len - 1, progress)


class Sleeping(Counting):
    """Starts a grandchild in a session of its own, notes both process ids, and never comes to an end."""

    def load(self, batch_size: int) -> None:
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        with open(os.environ["PID_FILE"], "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        time.sleep(600)


class Hungry(Counting):
    """Batches above 2 take more memory than a small cap allows."""

    def load(self, batch_size: int) -> None:
        super().load(batch_size)
        if batch_size > 2:
            self.held = bytearray(os.urandom(2**20)) * 2000


class Unprepared(Counting):
    """Needs a file that takes more memory to make than the cell has."""

    def is_prepared(self) -> bool:
        return (self.files.cache / "made").exists()

    def prepare(self) -> None:
        self.held = bytearray(os.urandom(2**20)) * 800
        (self.files.cache / "made").touch()


class Delegating(Counting):
    """Lets a helper process do the work that takes too much memory."""

    def load(self, batch_size: int) -> None:
        code = "import os; x = bytearray(os.urandom(2**20)) * 2000"
        subprocess.run([sys.executable, "-c", code], check=True)


class HungryLater(Hungry):
    """Takes the memory in full generation only, not while tuning."""

    def load(self, batch_size: int) -> None:
        Counting.load(self, batch_size)

    def generate(self, prompts: Sequence[Sequence[int]], gen_len: int, progress: Progress) -> Generation:
        if gen_len > 2:
            Hungry.load(self, self.batch_size)
        return super().generate(prompts, gen_len, progress)


class Choosing(Counting):
    """Follows policies; says which it has run."""

    def report(self) -> SystemReport:
        return SystemReport(requested=to_json(Policy(2, 2)))


class ChoosingShort(Choosing, Short):
    """One token too few under that policy."""
