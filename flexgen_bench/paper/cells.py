"""The cells of one table: a printed value each, what is simulated or was run beside it, and its footnotes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flexgen_bench.config.schema import AssumedConf, MeasuredScoreConf, TableConf
from flexgen_bench.config.table import engine_lossy
from flexgen_bench.core.compression import EXACT
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.status import Evidence
from flexgen_bench.paper.quantities import is_of_a_job, quantity
from flexgen_bench.paper.recorded import Recorded, find
from flexgen_bench.paper.scores import Scores
from flexgen_bench.paper.settings import run_text
from flexgen_bench.paper.simulate import OOM, PaperJob, Simulation, Simulations, policy_options
from flexgen_bench.published.policy_text import PolicyText, parse_policy
from flexgen_bench.published.quoted import Quoted

NOTHING = "-"
OVERLAPPED = (
    "its blocks overlap, prompts being computed while others decode, so neither phase has a time or a throughput of "
    "its own; "
    "only the whole job has"
)
_EXACT = str(EXACT)


@dataclass(frozen=True)
class Counterpart:
    """What stands beside a printed value: a number, or the word for why there is none.

    evidence None: nothing was simulated or run. source: the predictor's system, or the record. settings: what it ran
    with. lossy: what it changed of the results, in words; "" if nothing ran that says it.
    """

    value: float | None = None
    word: str = NOTHING
    evidence: Evidence | None = None
    source: str = ""
    settings: str = ""
    lossy: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Cell:
    """published: the paper's value; simulated: the same system; ours: this project's engine, ``ours_lossy`` naming what
    it changed (what it might change, where it has no value).

    unrounded: the value ratios are taken with, where the printed one is a rounding too coarse for that. assumed: in
    words. has_ratio: whether this divided by that says anything.
    """

    published: Quoted
    simulated: Counterpart = Counterpart()
    ours: Counterpart = Counterpart()
    ours_lossy: str = ""
    unrounded: float | None = None
    assumed: str = ""
    has_ratio: bool = True
    notes: tuple[int, ...] = ()

    def ratio(self, other: Counterpart) -> float | None:
        """``other`` / published."""
        base = self.published.number if self.unrounded is None else self.unrounded
        if not base or other.value is None or not self.has_ratio:
            return None
        return other.value / base


@dataclass(frozen=True)
class Sources:
    """What cells are filled from. simulations None: nothing is simulated."""

    simulations: Simulations | None
    records: Sequence[Recorded]
    results_dir: Path
    scores: Scores | None = None


def build_cell(row: Quoted, table: TableConf, sources: Sources, notes: tuple[int, ...] = ()) -> Cell:
    """The cell of one printed row. Raises UserError where a job's time is asked for and nobody knows how many prompts
    it had."""
    conf = table.systems.get(row.system)
    assumed = [a for a in table.assumed if row.matches(a.where)]
    policy, prompts = _policy(row, assumed)
    simulated, ours = Counterpart(), Counterpart(word=table.ours_missing)
    name = table.predict.get(row.metric) or table.predict.get(row.quantity)
    permitted = None if conf is None else engine_lossy(conf.ours)
    if name is not None and sources.simulations is not None:
        counted = policy.num_prompts if prompts is None else prompts
        if is_of_a_job(name) and row.names_a_job and counted is None:
            raise _uncounted(row, name)
        questions = _Questions(row, table, sources, sources.simulations, name)
        published_name = (conf and conf.simulated_as) or row.system
        # Compression that a text does not state is what its system is named for, as beside it.
        named = policy if policy.lossy is not None else replace(policy, lossy=permitted)
        simulated = questions.original(published_name, named, prompts)
        if permitted is not None:
            whole_job = policy.executed is not None or policy.eval_instances is not None
            given = prompts if prompts is not None else policy.num_prompts if whole_job else None
            job = questions.job(given, PolicyText(lossy=permitted))
            ours = questions.engine(job)
    score = table.accuracy.get(row.metric)
    if score is not None and conf is not None and conf.mode is not None:
        ours = _measured(row, table, sources, conf.mode, score)
    elif permitted is None:
        ours = Counterpart()
    lossy = _EXACT if permitted is None else ours.lossy or str(permitted)
    return Cell(
        published=row,
        simulated=simulated,
        ours=ours,
        ours_lossy="" if lossy == _EXACT else lossy,
        unrounded=next((a.unrounded for a in assumed if a.unrounded is not None), None),
        assumed="; ".join(_assumed_texts(assumed, policy if simulated.source else None)),
        has_ratio=row.quantity not in table.no_ratio,
        notes=notes,
    )


def _measured(row: Quoted, table: TableConf, sources: Sources, mode: str, score: MeasuredScoreConf) -> Counterpart:
    model = table.models.get(row.model, row.model.lower())
    score_record = (
        None if sources.scores is None else sources.scores.find(model, table.engine, mode, score.task, score.metric)
    )
    if score_record is None:
        return Counterpart(word=table.ours_missing)
    return Counterpart(score_record.value, NOTHING, score_record.evidence, score_record.source, score_record.settings)


@dataclass(frozen=True)
class _Questions:
    """The questions of one cell."""

    row: Quoted
    table: TableConf
    sources: Sources
    simulations: Simulations
    quantity: str

    def job(self, num_prompts: int | None, policy: PolicyText) -> PaperJob | None:
        """None where the row names no job, or conf/model has no such model."""
        model = self.table.models.get(self.row.model, self.row.model.lower())
        prompt_len, gen_len = self.row.count("prompt_len"), self.row.count("gen_len")
        if model not in self.simulations.models or not prompt_len or not gen_len:
            return None
        return PaperJob(
            model,
            self.table.machine,
            prompt_len,
            gen_len,
            num_prompts,
            policy.lossy or EXACT,
            self.row.count("gpus") or 1,
        )

    def original(self, published_name: str, policy: PolicyText, prompts: int | None) -> Counterpart:
        system = self.simulations.by_published_name(published_name, self.table.engine)
        job = self.job(policy.num_prompts if prompts is None else prompts, policy)
        if system is None or job is None:
            return Counterpart()
        options = policy_options(policy, system)
        return self._recorded(system.name, job, options) or self._simulation(
            self.simulations.ask(system, options, job), system.name
        )

    def engine(self, job: PaperJob | None) -> Counterpart:
        system = self.simulations.named(self.table.engine)
        if system is None or job is None:
            return Counterpart(word=self.table.ours_missing)
        return self._recorded(system.name, job, {}) or self._simulation(
            self.simulations.ask(system, {}, job), system.name
        )

    def _simulation(self, answer: Simulation, name: str) -> Counterpart:
        if answer.run is None:
            evidence = Evidence.SIMULATED if answer.word == OOM else None
            return Counterpart(word=answer.word, evidence=evidence, source=name, reason=answer.reason)
        counterpart = self._of(answer.run, self.row.count("gpus") or 1, Evidence.SIMULATED, name)
        return replace(counterpart, settings=answer.settings, lossy=answer.lossy)

    def _recorded(self, name: str, job: PaperJob, options: Mapping[str, object]) -> Counterpart | None:
        recorded = find(self.sources.records, name, job, options)
        if recorded is None:
            return None
        record, path = recorded.stored.record, recorded.stored.path
        source = path.relative_to(self.sources.results_dir).as_posix()
        if recorded.run is None:
            return Counterpart(None, OOM, record.evidence, source, reason=record.reason)
        counterpart = self._of(recorded.run, 1, record.evidence, source)
        return replace(counterpart, settings=run_text(recorded.run), lossy=str(recorded.lossy))

    def _of(self, run: Prediction, gpus: int, evidence: Evidence, source: str) -> Counterpart:
        value = quantity(self.quantity, run, gpus)
        if value is None and run.overlapped:
            return Counterpart(source=source, reason=f"{source}: {OVERLAPPED}")
        return Counterpart(value, NOTHING, evidence, source)


def _uncounted(row: Quoted, name: str) -> UserError:
    return UserError(
        f"table.predict.{row.metric}",
        name,
        f"of rows whose number of prompts is known (of {row.system}, {row.model}, {row.prompt_len} + {row.gen_len} "
        "tokens it is not)",
        "A job's time depends on it: state num_prompts for these rows under assumed, with its source; or take a "
        "throughput, or block_latency_s.",
    )


def _policy(row: Quoted, assumed: Sequence[AssumedConf]) -> tuple[PolicyText, int | None]:
    """The printed policy, or the one that is assumed in its place; and the number of prompts, if assumed."""
    text = next((a.policy for a in assumed if a.policy is not None), row.policy)
    prompts = next((a.num_prompts for a in assumed if a.num_prompts is not None), None)
    return parse_policy(text), prompts


def _assumed_texts(assumed: Sequence[AssumedConf], requested: PolicyText | None) -> list[str]:
    """requested: the policy that a system was asked for, which may leave something for it to choose."""
    texts = [_assumed_text(one) for one in assumed]
    return texts + ([requested.unsaid] if requested is not None and requested.unsaid else [])


def _assumed_text(assumed: AssumedConf) -> str:
    parts = [f"policy {assumed.policy}"] if assumed.policy is not None else []
    parts += [f"{assumed.num_prompts} prompts"] if assumed.num_prompts is not None else []
    parts += [f"unrounded {assumed.unrounded:g}"] if assumed.unrounded is not None else []
    return f"{', '.join(parts)} ({assumed.source})"
