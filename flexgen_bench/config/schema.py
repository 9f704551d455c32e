"""Schemas of the conf groups: which keys a YAML file may have, and of which type. ``typed.py`` enforces them.

What a core type has a default for takes it from there; what a key is beyond its core type (a size as text, an enum by
its value) is turned into it by ``build.py``.

Not frozen, although nothing changes them: OmegaConf takes frozen classes for nodes that cannot be merged into.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from flexgen_bench.core.cell import MeasureSpec, ModelSpec
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.simulated import SystemModel
from flexgen_bench.core.workload import Workload

# What OmegaConf takes for "must be given"; written out so that typed.py alone knows OmegaConf.
MISSING: Any = "???"


@dataclass
class ModelConf:
    """conf/model: a shape, and where its weights can come from. ``locations``: source -> hub id, package, path."""

    name: str = MISSING
    family: str = MISSING
    num_layers: int = MISSING
    hidden_size: int = MISSING
    num_heads: int = MISSING
    num_kv_heads: int = MISSING
    head_dim: int = MISSING
    ffn_size: int = MISSING
    vocab_size: int = MISSING
    max_positions: int = MISSING
    tied_embeddings: bool = MISSING
    options: dict[str, Any] = field(default_factory=dict)
    weights: str = ModelSpec.weights.value
    locations: dict[str, str] = field(default_factory=dict)
    seed: int = ModelSpec.seed


@dataclass
class GpuConf:
    """conf/gpu: a machine. Sizes are bytes, text such as 16GB, or a share of the model such as 50% of weights; null is
    whatever the local machine has.

    gpu_memory_is_cap: a larger card is held to gpu_memory, so what its driver and a process' context take is outside.
    count: devices that work together, each of them a rank with layers of its own; gpu_memory is one device's, host
    memory and disk are the machine's. layers_per_rank: how many layers each of them has; null divides them.
    tensor_parallel: devices that share every layer, each a rank with a slice of its heads and columns; count is 1 then.
    rates: see core.rates.Rates. workload, dtype: what is asked of this machine where the command line names none.
    """

    name: str = MISSING
    accelerator: str = MISSING
    gpu_memory: Any = None
    cpu_memory: Any = None
    disk: Any = None
    gpu_memory_is_cap: bool = HardwareProfile.gpu_memory_is_cap
    device_match: str = HardwareProfile.device_match
    count: int = HardwareProfile.count
    layers_per_rank: list[int] | None = None
    tensor_parallel: int = HardwareProfile.tensor_parallel
    links: dict[str, float] = field(default_factory=dict)
    rates: dict[str, Any] | None = None
    sources: dict[str, str] = field(default_factory=dict)
    workload: str | None = None
    dtype: str | None = None


@dataclass
class WorkloadConf:
    """conf/workload: what is asked of a system."""

    name: str = MISSING
    kind: str = MISSING
    num_prompts: int = MISSING
    prompt_len: int = MISSING
    gen_len: int = MISSING
    min_prompt_len: int = Workload.min_prompt_len
    seed: int = Workload.seed


@dataclass
class PlacementConf:
    """Shares per tier."""

    gpu: float = Placement.gpu
    cpu: float = Placement.cpu
    disk: float = Placement.disk


@dataclass
class LossyConf:
    """What may change results; see core.compression.Lossy. weights, kv_cache: bits (3, 4 or 8), or null; or a name such
    as
    4-bit/outputs/mse, or a mapping {bits: 4, group_size: 64, along: outputs, scales: mse}. group_size: where none is
    named. activations: 8 bits for what 4-bit weights are multiplied with, or null."""

    weights: Any = None
    kv_cache: Any = None
    group_size: int = Compression.group_size
    value_share: float = Lossy.value_share
    activations: int | None = Lossy.activations


@dataclass
class PolicyConf:
    """conf/policy. With ``auto`` the system chooses, within ``max_latency_s`` if it is given, and of the rest only
    ``lossy`` is looked at."""

    name: str = MISSING
    auto: bool = False
    gpu_batch_size: int = Policy.gpu_batch_size
    num_gpu_batches: int = Policy.num_gpu_batches
    weights: PlacementConf = field(default_factory=PlacementConf)
    kv_cache: PlacementConf = field(default_factory=PlacementConf)
    activations: PlacementConf = field(default_factory=PlacementConf)
    prefetch: int = Policy.prefetch
    overlap: bool = Policy.overlap
    attention: str = Policy.attention.value
    schedule: str = Policy.schedule.value
    prefill_chunk: int | None = Policy.prefill_chunk
    offloaded: str = Policy.offloaded.value
    lossy: LossyConf = field(default_factory=LossyConf)
    experts: PlacementConf | None = None
    expert_loads: str = Policy.expert_loads.value
    kv_moved: float = Policy.kv_moved
    max_latency_s: float | None = None


@dataclass
class SystemConf:
    """conf/system: the class behind a system, its options, and what each option may be.

    target null: it cannot be run, only predicted. predictor: the class that predicts it (planner.predictor.Predictor);
    constants: what that one is told. printed_as: its name in the FlexGen paper, for the values quoted beside it.
    follows_policy: policy= is meant for it.
    subject: it is what the benchmark is about; a command that measures it tells by its exit status how that went, and
    only warns of the others.
    environment: variables of its process, over those that every system gets alike.
    """

    name: str = MISSING
    target: str | None = MISSING
    follows_policy: bool = SystemModel.follows_policy
    subject: bool = False
    predictor: str | None = SystemModel.predictor
    constants: dict[str, float] = field(default_factory=dict)
    printed_as: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class TrackerConf:
    """conf/tracker: where runs are sent besides the disk."""

    name: str = "none"
    mode: str | None = None
    project: str | None = None
    entity: str | None = None
    timeout_s: float | None = None

    def options(self) -> dict[str, Any]:
        """The tracker's settings that are given."""
        return {key: value for key, value in asdict(self).items() if key != "name" and value is not None}


@dataclass
class CellGroupConf:
    """Cells that differ in the system alone. Each override is one of the command line's.

    matrix: names with their values: the group stands for one group per combination of values, in whose name and
    overrides ``{name}`` is the value (``matrix.py``).
    """

    name: str = MISSING
    overrides: list[str] = field(default_factory=list)
    systems: list[str] = field(default_factory=list)
    system_overrides: dict[str, list[str]] = field(default_factory=dict)
    matrix: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class SuiteConf:
    """conf/suite: a list of cell groups."""

    cells: list[CellGroupConf] = field(default_factory=list)


@dataclass
class PrintedSystemConf:
    """What stands beside a system of a printed table. simulated_as: the ``printed_as`` of the conf/system that is
    simulated (null: its own name); ours: what this project's engine may change of the results beside it (null: it is
    not asked); mode: the mode of conf/accuracy/modes whose accuracy is looked up (null: none)."""

    simulated_as: str | None = None
    ours: LossyConf | None = None
    mode: str | None = None


@dataclass
class MeasuredScoreConf:
    """What is looked up in results/accuracy for a printed metric: a task, and a metric of it."""

    task: str = MISSING
    metric: str = MISSING


@dataclass
class NoteConf:
    """A footnote: its text, or the key of one in conf/paper/footnotes.yaml. where: fields of the cells it is put at and
    their values; none: it is said of the whole table."""

    text: str | None = None
    key: str | None = None
    where: dict[str, str] = field(default_factory=dict)


@dataclass
class AssumedConf:
    """What is taken for cells whose printed text is not enough: a policy to simulate, the value before it was
    rounded."""

    where: dict[str, str] = field(default_factory=dict)
    policy: str | None = None
    num_prompts: int | None = None
    unrounded: float | None = None
    source: str = MISSING


@dataclass
class FigureConf:
    """A plot of a table's cells, of those that meet ``where``. x: a field, or a quantity; y: a quantity; a line for
    each ``series``."""

    name: str = MISSING
    title: str = MISSING
    x: str = MISSING
    y: str = MISSING
    series: list[str] = field(default_factory=list)
    where: dict[str, str] = field(default_factory=dict)
    log: bool = False


@dataclass
class TableConf:
    """conf/table: a table of a paper, regenerated. Fields are columns of conf/paper/*.csv.

    printed: its ids there (column ``table``); select: the rows that are taken, by field, and their order; extra: cells
    of which nothing is printed. rows, columns: the fields that make the table's rows and columns; grids: the field that
    cuts it in several.
    accuracy: metric -> the score that this project's engine has beside it. labels: shorter words for values. models:
    conf/model of a printed name. predict: quantity -> what of a prediction it is.
    machine: conf/gpu. lines: what is shown of each row; decimals: the paper's own. no_ratio: quantities that are not
    better by being more.
    """

    title: str = MISSING
    printed: list[str] = MISSING
    rows: list[str] = MISSING
    columns: list[str] = MISSING
    grids: str | None = None
    select: dict[str, list[str]] = field(default_factory=dict)
    extra: list[dict[str, str]] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    machine: str = "t4"
    models: dict[str, str] = field(default_factory=dict)
    systems: dict[str, PrintedSystemConf] = field(default_factory=dict)
    engine: str = "flexgen"
    ours_missing: str = "-"
    predict: dict[str, str] = field(
        default_factory=lambda: {
            "generation throughput": "generation_tok_per_s",
            "decoding throughput": "decode_tok_per_s",
        }
    )
    accuracy: dict[str, MeasuredScoreConf] = field(default_factory=dict)
    assumed: list[AssumedConf] = field(default_factory=list)
    no_ratio: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=lambda: ["printed", "simulated", "ours"])
    decimals: int | None = None
    notes: list[NoteConf] = field(default_factory=list)
    figures: list[FigureConf] = field(default_factory=list)


@dataclass
class FootnotesConf:
    """conf/paper/footnotes.yaml: what several tables say of the paper's numbers, by key."""

    notes: dict[str, str] = field(default_factory=dict)


@dataclass
class MeasureConf:
    """How each cell is measured; see core.cell.MeasureSpec. budget_s: seconds that a system may take for a cell, as
    predicted (see budget.py); null for whatever it takes."""

    repetitions: int = MeasureSpec.repetitions
    warmup: int = MeasureSpec.warmup
    time_limit_s: float = MeasureSpec.time_limit_s
    batch_sizes: list[int] = field(default_factory=lambda: list(MeasureSpec.batch_sizes))
    tuning_gen_len: int = MeasureSpec.tuning_gen_len
    budget_s: float | None = None


@dataclass
class AppConf:
    """The whole configuration, as conf/config.yaml lays it out."""

    model: ModelConf = field(default_factory=ModelConf)
    gpu: GpuConf = field(default_factory=GpuConf)
    workload: WorkloadConf = field(default_factory=WorkloadConf)
    policy: PolicyConf = field(default_factory=PolicyConf)
    system: SystemConf | None = None
    tracker: TrackerConf = field(default_factory=TrackerConf)
    suite: SuiteConf | None = None
    cell: str | None = None
    shard: str | None = None
    weights: str | None = None
    location: str | None = None
    dtype: str = "bfloat16"
    threads: int | None = None
    measure: MeasureConf = field(default_factory=MeasureConf)
    rerun: bool = False
    dry_run: bool = False
    calibrate: bool = True
    json: bool | None = None
    results_dir: str = "results"
    cache_dir: str | None = None
