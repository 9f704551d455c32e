"""The offloading engine: a model under a policy, running jobs of any number of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flexgen_bench.core.errors import DoesNotFit, UserError
from flexgen_bench.core.folders import make_writable
from flexgen_bench.core.hardware import Accelerator
from flexgen_bench.core.moment import JobState
from flexgen_bench.core.pipeline import Stage
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.progress import Progress, quiet
from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.actions import Actions, Consumer
from flexgen_bench.engine.arenas import Arenas, together
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.executor import Executor
from flexgen_bench.engine.generation import Generation, Running, are_greedy, check_new, requests_of
from flexgen_bench.engine.graphs import Graphs, graphs_for
from flexgen_bench.engine.job_run import JobResult, JobRun
from flexgen_bench.engine.kept_prefix import KeptPrefixes, can_keep
from flexgen_bench.engine.layers import Formulas
from flexgen_bench.engine.memory_pool import KeptMemory
from flexgen_bench.engine.open_job import OpenJob
from flexgen_bench.engine.packed_products import weights_path, with_packed_products
from flexgen_bench.engine.scoring import Found, LogProbabilities, Scoring
from flexgen_bench.engine.traceback_cleanup import release_frames
from flexgen_bench.engine.weights import Weights
from flexgen_bench.engine.wire import Wire
from flexgen_bench.memory.spill import SpillFile
from flexgen_bench.memory.weight_store import TORCH_DTYPES, WeightStore
from flexgen_bench.models.family import ModelFamily
from flexgen_bench.models.model import Model
from flexgen_bench.planner.graph_memory import graph_bytes
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.planner.scoring import ScoringPlan, lay_out, plan_scoring
from flexgen_bench.schedule.admission import OpenAdmission
from flexgen_bench.schedule.prefix_tree import ScoreRequest, grow
from flexgen_bench.schedule.scheduler import Scheduler
from flexgen_bench.schedule.sequence_groups import Capacity, Request

# Of each row of logits, what the host needs of it where every sequence is greedy: the number of the largest.
GREEDY_ROW_BYTES = 8


class Engine:
    """Weights in place, ready for jobs. Use ``close`` when done.

    stage: what it computes of the model, if it is one of several ranks; None: all of it. (``model`` may be a slice,
    which several ranks share every layer of.) All ranks run the same jobs:
    ``generate`` with sequences of the same prompts and parameters, in the same order. wire: how this rank reaches the
    others. A job that fails aborts it; another one can be put in its place (``wire``), on all ranks.

    Raises DoesNotFit if the weights alone exceed a tier, UserError for a policy this machine cannot follow.
    """

    def __init__(
        self,
        family: ModelFamily,
        model: Model,
        store: WeightStore,
        policy: Policy,
        device: Device,
        offload_dir: Path,
        stage: Stage | None = None,
        wire: Wire | None = None,
    ) -> None:
        if policy.lossy.activations and device.hardware.accelerator is not Accelerator.NONE:
            raise UserError(
                "policy.lossy.activations",
                policy.lossy.activations,
                "none on an accelerator",
                "Such products exist on a processor only: gpu=cpu, or activations=null.",
            )
        self.policy, self.stage, self.wire = policy, None if stage is None or stage.ranks == 1 else stage, wire
        self.part = model.part
        if (self.stage is None and self.part is None) is not (wire is None):
            raise ValueError(f"{stage}, {self.part}, {wire}: several ranks need a wire, and nothing else does")
        self._family, self._model = family, model
        self._formulas = Formulas(family, model.shape, model.decoder)
        self._device, self._offload_dir = device, offload_dir
        # The smallest job there is: refuses a policy whose weights do not fit before they are read.
        self._available = device.available(make_writable(offload_dir, "offload_dir"))
        smallest = self.plan([Request(1, 1)])
        self._check(smallest)
        self._arenas = Arenas(device)
        self._kept = KeptMemory()
        try:
            activations = policy.lossy.activations
            packed = model.packed_for(policy)
            self._weights = Weights(store, packed, model.dtype, smallest.job, device, self._arenas, activations)
        except BaseException as error:
            release_frames(type(error), error, error.__traceback__)
            raise
        self._closed = False
        self._open: OpenJob | None = None
        self._running: JobRun | None = None
        self._ended: JobState | None = None
        self.direct_io = self._weights.direct_io

    def generate(self, sequences: Sequence[Running], progress: Progress = quiet) -> JobResult:
        """Run every sequence to its end. Results are in the sequences themselves.

        After an error the engine is ready for the next job, with new sequences: what the failed job has left in these
        is no result. Of several ranks, all fail with one, and their wires are of no more use.
        """
        try:
            return self._generate(sequences, progress)
        except BaseException as error:
            self._tell_others(error)
            raise

    def _generate(self, sequences: Sequence[Running], progress: Progress) -> JobResult:
        check_new(sequences)
        requests, row = self.asked(sequences)
        generation = Generation(dict(enumerate(sequences)))
        return self._run(self.plan(requests, row), generation, progress)

    def asked(self, sequences: Sequence[Running]) -> tuple[list[Request], int]:
        """What a job of these asks for: its requests, and the bytes of a row of logits that the host needs."""
        requests = requests_of(sequences, self._family.steady_positions(self._model.shape))
        return requests, GREEDY_ROW_BYTES if are_greedy(sequences) else 4 * self._model.shape.vocab_size

    def open(self, capacity: Capacity) -> OpenJob:
        """A job that takes requests within a capacity while it runs. Until it is closed this engine runs nothing else.

        Raises DoesNotFit if the capacity has no room. More sequences than a block of the policy has do not run at once:
        the others wait.
        """
        capacity, plan = self.plan_open(capacity)
        self.check_free()
        self._check(plan)
        sequences: dict[int, Running] = {}
        generation, admission = Generation(sequences), OpenAdmission(plan.groups)
        result = JobResult(plan=plan)
        held = ExitStack()
        executor, actions = held.enter_context(self._job(plan, generation, self.policy, result))
        scheduler = Scheduler(self.policy, plan, generation.logit_rows, admission, generation.on_device)
        run = JobRun(
            *(scheduler, plan.job, executor, actions, generation, result),
            prefixes=KeptPrefixes(actions.cache, sequences) if capacity.keeps else None,
            overlap=self.policy.overlap,
        )
        self._open = OpenJob(capacity, admission, sequences, run, held, self._give_back, result)
        return self._open

    def plan_open(self, capacity: Capacity) -> tuple[Capacity, MemoryPlan]:
        """The plan of an open job, and its capacity: without kept tokens where none can be kept."""
        self._refuse_ranks("a job that takes requests while it runs (serve, chat, stream)")
        plan = self.plan(capacity, 4 * self._model.shape.vocab_size)
        # Beyond its steady positions a model's keys depend on the length of their sequence.
        longest = capacity.prompt_len + capacity.gen_len - 1
        if capacity.keeps and not (can_keep(plan) and longest <= self._family.steady_positions(self._model.shape)):
            return self.plan_open(replace(capacity, kept_tokens=0))
        return capacity, plan

    def score(self, requests: Sequence[ScoreRequest], found: Found, progress: Progress = quiet) -> JobResult:
        """Log-likelihoods of continuations. ``found`` gets each as soon as it is there, from a thread of the engine."""
        scoring_plan = self.scoring(requests)
        return self._run(scoring_plan.plan, Scoring(scoring_plan.trees, found), progress, scoring_plan.policy)

    def log_probabilities(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Of each sequence, the distributions of its tokens but the first: (T-1, V) float32. For few sequences: all are
        in memory."""
        self._refuse_ranks("scoring")
        trees = [grow([ScoreRequest(s, 1)], len(s))[0] for s in sequences]
        rows = max(tree.rows for tree in trees)
        scoring_plan = plan_scoring(self._planned, self.policy, trees, rows, 4 * self._model.shape.vocab_size)
        distributions: list[list[Tensor]] = [[] for _ in sequences]
        consumer = LogProbabilities(trees, lambda i, piece: distributions[i].append(piece))
        self._run(scoring_plan.plan, consumer, policy=scoring_plan.policy)
        return [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in distributions]

    def can_score(self, requests: Sequence[ScoreRequest]) -> bool:
        """Whether these can be scored under this engine's policy."""
        try:
            self.scoring(requests)
        except DoesNotFit:
            return False
        return True

    def scoring(self, requests: Sequence[ScoreRequest]) -> ScoringPlan:
        """How requests are laid out and planned under this engine's policy. Raises DoesNotFit."""
        self._refuse_ranks("scoring")
        return lay_out(self._planned, self._check, self.policy, requests)

    def plan(
        self, requests: Sequence[Request] | Capacity, logits_row_bytes: int = GREEDY_ROW_BYTES, scored_rows: int = 0
    ) -> MemoryPlan:
        """The plan of a job of these requests, or of a capacity, under this engine's policy."""
        return self._planned(self.policy, requests, logits_row_bytes, scored_rows)

    def _planned(
        self,
        policy: Policy,
        requests: Sequence[Request] | Capacity,
        logits_row_bytes: int = GREEDY_ROW_BYTES,
        scored_rows: int = 0,
    ) -> MemoryPlan:
        hardware = self._device.hardware
        plan = plan_job(self._model, policy, hardware, requests, logits_row_bytes, scored_rows, stage=self.stage)
        return with_packed_products(plan, self._device)

    def fits(self, requests: Sequence[Request]) -> bool:
        """Whether a job of these requests can run under this engine's policy."""
        try:
            self.check(requests)
        except DoesNotFit:
            return False
        return True

    def check(self, requests: Sequence[Request], logits_row_bytes: int = GREEDY_ROW_BYTES) -> None:
        """Raise DoesNotFit if a job of these requests cannot run under this engine's policy."""
        self._check(self.plan(requests, logits_row_bytes))

    def release_kept(self) -> None:
        """Give back what the last job has left for the next one; that one will take its memory anew."""
        self._kept.release()

    def close(self) -> None:
        """Release the weights, and what the last job has left; an open job is closed. A second time does nothing."""
        self._closed = True
        if self._open is not None:
            self._open.close()
        self.release_kept()
        self._weights.close()

    def _check(self, plan: MemoryPlan) -> None:
        """Against what was free before the weights were loaded: a plan counts them in."""
        plan.check(self._available)

    def _graphs(self, plan: MemoryPlan) -> Graphs:
        """Recorded only where there is room beside the plan, which does not count them."""
        limits = (self._available.get(Tier.GPU), self._device.hardware.capacity_bytes(Tier.GPU))
        known = [limit for limit in limits if limit is not None]
        room = min(known, default=0) - plan.total(Tier.GPU, plan.job.device)
        return graphs_for(self._device, graph_bytes(plan) <= room, plan.job.tokens_stay)

    def check_free(self) -> None:
        """UserError if no job can be run now: the engine is closed, or taken by an open job."""
        if self._closed:
            raise UserError("Engine", "closed", "open", "Make a new one.")
        if self._open is not None:
            raise UserError(
                "Engine",
                "in use by an open job",
                "free: a job has the weights' buffers to itself",
                "Add the requests to that job, or close it (a stream: read it to its end, or close it).",
            )

    def _refuse_ranks(self, job: str) -> None:
        for name, ranks in (("gpu.count", self.stage), ("gpu.tensor_parallel", self.part)):
            if ranks is not None:
                raise UserError(name, ranks.ranks, f"1 for {job}", "Several ranks generate for lists of prompts.")

    def _tell_others(self, error: BaseException) -> None:
        """That this rank has failed: its lanes need not wait for the others, nor they for it."""
        if self.wire is not None:
            self.wire.abort(error)

    def _give_back(self) -> None:
        self._open = None

    def _run(
        self, plan: MemoryPlan, consumer: Consumer, progress: Progress = quiet, policy: Policy | None = None
    ) -> JobResult:
        """policy: the one that was planned for, if it is not the engine's own; it differs in the shape of blocks
        alone."""
        policy = policy or self.policy
        self.check_free()
        self._check(plan)
        result = JobResult(plan=plan)
        with self._job(plan, consumer, policy, result) as (executor, actions):
            scheduler = Scheduler(policy, plan, consumer.logit_rows, on_device=consumer.on_device)
            self._drive(
                JobRun(
                    *(scheduler, plan.job, executor, actions, consumer, result, plan.groups.requests, progress),
                    overlap=policy.overlap,
                ),
                executor,
            )
        return result

    def _drive(self, run: JobRun, executor: Executor) -> None:
        """All passes of a closed job, and what their lanes still do. In a frame of its own, which holds nothing when an
        error has left it."""
        self._running, self._ended = run, None
        try:
            run.run()
            executor.drain()
            self._ended = run.state()
        finally:
            self._running = None

    def job_state(self) -> JobState | None:
        """What the job that runs is doing, asked from its progress; afterwards how the last one ended."""
        return self._ended if self._running is None else self._running.state()

    @contextmanager
    def _job(
        self, plan: MemoryPlan, consumer: Consumer, policy: Policy, result: JobResult
    ) -> Iterator[tuple[Executor, Actions]]:
        """Everything that a job needs for itself, allocated from its plan and released at its end. ``result`` gets what
        the lanes did."""
        spilled = sum(plan.bytes.get(plan.job.site_of(Tier.DISK), {}).get(k, 0) for k in ("kv_cache", "activations"))
        arenas = Arenas(self._device, self._kept)
        # Released in reverse: no lane may be running when its memory goes.
        with ExitStack() as held:
            held.push(release_frames)
            held.push(arenas.end)
            spill = SpillFile(self._offload_dir, spilled) if spilled else None
            if spill is not None:
                held.callback(spill.close)
            graphs = self._graphs(plan)
            actions = Actions(
                self._formulas,
                TORCH_DTYPES[self._model.dtype],
                policy,
                plan,
                self._weights,
                self._device,
                arenas,
                spill,
                consumer,
                graphs,
                self.wire,
            )
            held.callback(actions.close)
            lanes = self._device.lane_settings(network=self.wire is not None)
            executor = Executor(lanes, policy.overlap, actions.settled, self._tell_others)
            held.callback(executor.close)
            result.allocated = together(plan.job, self._arenas.bytes, arenas.bytes)
            try:
                yield executor, actions
                executor.drain()
            except BaseException:
                executor.abort()
                raise
        result.lanes, result.timeline = executor.use(), executor.timeline()
        result.decode_path = graphs.path + weights_path(plan)
        result.allocated = together(plan.job, self._arenas.bytes, arenas.bytes)
