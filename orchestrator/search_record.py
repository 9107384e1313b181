"""What a search leaves in MLflow: a child run for every candidate, and the chosen setting on the run of its task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from multilora.registry import TAG_PARENT, Registry
from orchestrator.config import OrchestratorConfig
from orchestrator.search import FOUND, Fate, Found, Trail, fates, found_of, load_trails, winner
from orchestrator.work import TaskWork

TAG_SEARCH, TAG_CANDIDATE = "search", "candidate"


class SearchRecord:
    """Writes the runs of candidates; every write can be repeated."""

    def __init__(self, config: OrchestratorConfig, registry: Registry) -> None:
        self._config, self._registry = config, registry

    def run_of(self, work: TaskWork, run_key: str) -> str:
        """The id of a candidate's run, which is created the first time."""
        assert work.run is not None
        if run_key not in work.candidate_runs:
            found = self._registry.find_run(work.task, run_key)
            if found is None or found.tags.get(TAG_PARENT) != work.run.run_id:
                params = replace(work.prepared, spec=work.prepared.trainings[run_key]).params
                found = self._registry.start_run(work.task, run_key, params, {TAG_PARENT: work.run.run_id})
            work.candidate_runs[run_key] = found.run_id
        return work.candidate_runs[run_key]

    def close(self, work: TaskWork) -> Found | None:
        """End the runs of candidates: of all where the search is over, else of those that began; says what was found."""
        prepared = work.prepared
        if work.run is None or prepared.spec.search is None:
            return None
        epochs = {key: spec.train.epochs for key, spec in prepared.trainings.items()}
        known = load_trails(self._config.trails_file(prepared.run_key), epochs)
        trails = list(known.values())
        ends = fates(trails, prepared.spec.search.eta)
        is_over = not {Fate.TRAIN, Fate.WAIT} & set(ends)
        best = winner(trails) if is_over else None
        for number, (key, fate) in enumerate(zip(known, ends, strict=True)):
            if is_over or key in work.candidate_runs:
                open_end = "ended early" if fate is Fate.DROPPED else "not finished"
                end = "chosen" if number == best else known[key].end or open_end
                self._close_one(self.run_of(work, key), known[key], end)
        found = found_of(list(prepared.trainings.values()), trails, len(prepared.dataset.select)) if is_over else None
        if found:
            self._registry.log_params(work.run.run_id, {f"chosen.{name}": value for name, value in found.chosen.items()})
            self._registry.set_tags(work.run.run_id, {TAG_SEARCH: FOUND.dump_json(found).decode()})
        return found

    def _close_one(self, run_id: str, trail: Trail, end: str) -> None:
        """Write its select results by epoch, whatever curves a killed driver lost, and how it ended."""
        values = [("search/value", r.value, r.epoch, r.unix_ms) for r in trail.results if r.value is not None]
        losses = [("search/loss", r.loss, r.epoch, r.unix_ms) for r in trail.results]
        self._registry.log_metrics(run_id, [*values, *losses])
        self._registry.set_tags(run_id, {TAG_CANDIDATE: f"{end}: {trail.reason}" if trail.reason else end})
        self._registry.end_run(run_id, is_ok=end not in ("failed", "not finished"))


def found_in(tags: Mapping[str, str]) -> Found | None:
    """What the tags of a task's run say of its search."""
    return FOUND.validate_json(tags[TAG_SEARCH]) if TAG_SEARCH in tags else None
