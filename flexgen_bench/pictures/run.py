"""A record, or a prediction, as the quantities that pictures are made of."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.pictures.picture import Range, Source


@dataclass(frozen=True)
class Quantity:
    """range: as the record's interval has it; None where no spread is known."""

    value: float
    range: Range | None = None

    def times(self, factor: float) -> Quantity:
        ends = self.range
        return Quantity(self.value * factor, None if ends is None else (ends[0] * factor, ends[1] * factor))


@dataclass(frozen=True)
class Setting:
    """What must be equal for runs to be compared: words, and for models of one name their shape. machine: the kind of
    machine that a record was measured on; what is simulated has none. shape: a hash; "" where it is not known."""

    machine: str
    hardware: str
    model: str
    weights: str
    dtype: str
    workload: str
    threads: str
    shape: str

    @property
    def model_words(self) -> str:
        weights = f" ({self.weights} weights)" if self.weights else ""
        return f"{self.model}{weights}, {self.dtype}"

    @property
    def machine_words(self) -> str:
        return self.machine or f"{self.hardware}, from stated constants"


@dataclass(frozen=True)
class Run:
    """One record or prediction. Seconds, bytes, tokens/s; None where it does not tell.

    hardware, workload: their names in the configuration, and how many devices (``4 x t4``). block_s: from the start of
    a batch to its last token.
    input_s, output_s: seconds of prefill for each prompt token, and of decoding for each generated one; times a price
    both together are the whole bill. weight_bytes: of the uncompressed model. price_per_hour: USD.
    """

    source: Source
    system: str
    lossy: str
    evidence: Evidence
    status: Status
    reason: str
    setting: Setting
    hardware: str
    workload: str
    batch_size: int | None
    cpu_cap: int | None
    gpu_cap: int | None
    weight_bytes: int | None
    throughput: Quantity | None = None
    predicted: float | None = None
    block_s: Quantity | None = None
    first_token_s: Quantity | None = None
    later_token_s: Quantity | None = None
    input_s: Quantity | None = None
    output_s: Quantity | None = None
    price_per_hour: float | None = None
    price_source: str = ""
    rerun_command: str = ""

    @property
    def label(self) -> str:
        return f"{self.system} ({self.lossy})" if self.lossy else self.system

    @property
    def batch_words(self) -> str:
        return "" if self.batch_size is None else f"batch {self.batch_size}"
