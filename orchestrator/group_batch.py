"""One optimiser step of a group: the next batch of every adapter in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from multilora.scoring import ScoringRow
from orchestrator.adapter_run import AdapterRun
from orchestrator.batching import batch_indices, drawn_wording, dropout_key
from orchestrator.ranks import balanced_shares


@dataclass(frozen=True)
class GroupBatch:
    """Rows of all active adapters, each row with its gold label and its share of its adapter's mean loss."""

    rows: list[ScoringRow]
    gold: list[int]
    weights: list[float]
    runs: list[AdapterRun]

    @classmethod
    def of(cls, runs: Sequence[AdapterRun]) -> GroupBatch:
        """Take the next batch of every run."""
        batch = cls([], [], [], list(runs))
        for run in runs:
            settings = run.member.spec.train
            indices = batch_indices(len(run.train_ids), settings.batch_size, settings.seed, run.step)
            epoch = run.step // run.steps_per_epoch
            for position, index in enumerate(indices):
                wording = drawn_wording(len(run.train_ids[index]), settings.seed, epoch, index)
                key = dropout_key(settings.seed, run.step, position) if run.member.spec.lora.dropout else 0
                batch.rows.append(ScoringRow(run.train_ids[index][wording], run.slot, run.train_labels[index], key))
                batch.gold.append(run.train_gold[index])
                batch.weights.append(1.0 / len(indices))
        return batch

    def shares(self, num_ranks: int) -> list[GroupBatch]:
        """Deal the rows out to the ranks; weights stay, so the ranks' losses and gradients add up to the whole batch's."""
        return [
            GroupBatch(
                rows=[self.rows[i] for i in share],
                gold=[self.gold[i] for i in share],
                weights=[self.weights[i] for i in share],
                runs=self.runs,
            )
            for share in balanced_shares(self.lengths, num_ranks)
        ]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row, the gold answer included."""
        return [
            len(row.token_ids) + (len(row.labels.token_ids[gold]) if row.labels.token_ids else 0)
            for row, gold in zip(self.rows, self.gold, strict=True)
        ]

    @property
    def run_of_longest_row(self) -> AdapterRun:
        """Whose row takes the most memory."""
        slot = self.rows[max(range(len(self.rows)), key=self.lengths.__getitem__)].slot
        return next(run for run in self.runs if run.slot == slot)
