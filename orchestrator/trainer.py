"""Train several adapters in one forward and backward over one frozen base, each exactly as it would train alone.

Rows are independent over a frozen base, so an adapter's gradient in a mixed batch is its solo gradient. Loss, clipping,
learning rate, early stop and checkpoints are per adapter. An adapter that ends frees its slot for the next one. Every
adapter has a checkpoint file of its own, so a group may be cut short, split or mixed anew and each continues where it was.
Ranks share every batch's rows and take the same steps; the first reports plain events to a callback. Knows no Ray, no MLflow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from multilora.artifact import FORMAT_VERSION, AdapterArtifact, Canary, TaskCard, card_fields, digest_in, write_artifact
from multilora.base_model import FrozenBase
from multilora.errors import AdapterError, CapacityError, DataError
from multilora.generate import answer_text, generate
from multilora.lora import AdapterSlots
from multilora.prompt import PromptFormat, encode_prompt
from multilora.scoring import SCORER_VERSION, LabelSet, ScoringRow, answer_losses, encode_answer, encode_labels, score_labels
from multilora.spec_hash import spec_hash
from multilora.target_modules import match_modules
from orchestrator.adapter_run import AdapterRun, label_sets_of, load_state, now_ms, save_state
from orchestrator.calibration import fit_temperature
from orchestrator.dataset import Example
from orchestrator.frozen_prefix import FrozenPrefix
from orchestrator.gradient_checkpointing import checkpoint_layers
from orchestrator.group_batch import GroupBatch
from orchestrator.group_task import Member, RunKeys, TrainEvent
from orchestrator.micro_batches import MicroBatches
from orchestrator.ranks import ALONE, RankError, Ranks, balanced_shares

NUM_CANARIES = 4
NOT_FINITE = "loss is not finite; lower train.learning_rate, or use base.dtype float32"


class GroupTrainer:
    """Trains the members of one group over one base: forward_backward, optim_step, save_states, export_adapter."""

    def __init__(
        self,
        base: FrozenBase,
        members: Sequence[Member],
        num_slots: int,
        on_event: Callable[[TrainEvent], None],
        ranks: Ranks = ALONE,
    ) -> None:
        """Wrap the base for training. A member whose target modules match nothing fails at once."""
        self.base = base
        self._ranks = ranks
        self._on_event = on_event if ranks.rank == 0 else lambda event: None
        self._modules_of: dict[str, list[str]] = {}
        for member in members:
            lora = member.spec.lora
            try:
                self._modules_of[member.run_key] = match_modules(base.model, lora.target_modules, lora.layers)
            except AdapterError as error:
                self._refuse(member, error)
        self._waiting = [member for member in members if member.run_key in self._modules_of]
        wanted = set[str]().union(*self._modules_of.values())
        ordered = [name for name in match_modules(base.model, "all-linear") if name in wanted]
        max_rank = max((member.spec.lora.rank for member in self._waiting), default=1)
        self.num_slots = min(num_slots, len(self._waiting))
        self.slots = AdapterSlots(base.model, ordered, self.num_slots, max_rank, is_trainable=True)
        self._wrapped = ExitStack()
        self._wrapped.callback(self.slots.detach)
        if any(member.spec.resources.gradient_checkpointing for member in members):
            self._wrapped.callback(checkpoint_layers(base.model, self.slots))
        self._prefix = FrozenPrefix(base.model, ordered, num_workers=ranks.size)
        self._wrapped.callback(self._prefix.detach)
        self._active = list[AdapterRun]()
        self._micro_batches = MicroBatches(base.device, self._report_halved)

    def train(self, stopped: RunKeys, checkpoint_every_s: float, held: RunKeys = frozenset) -> None:
        """Train all members to their end; those that `stopped` names are saved and left, those that `held` names wait."""
        saved_at = time.monotonic()
        while self._waiting or self._active:
            leaving, waiting = self._ranks.from_first(lambda: (stopped(), held()))
            self._leave(leaving, waiting)
            self.admit(waiting)
            if not self._active:
                continue
            batch = self.next_batch()
            try:
                losses = self.forward_backward(batch)
            except RankError as error:  # the others go on without it
                self._fail(batch.shares(self._ranks.size)[error.rank].run_of_longest_row, str(error))
                continue
            self.optim_step(losses)
            for run in list(self._active):
                if run.step % run.steps_per_epoch == 0:
                    self._end_epoch(run)
            if time.monotonic() - saved_at > checkpoint_every_s:
                self.save_states()
                saved_at = time.monotonic()

    def detach(self) -> None:
        """Give the base its own layers back; this trainer is of no use afterwards."""
        self._wrapped.close()

    def admit(self, held: Collection[str] = ()) -> None:
        """Give free slots to members that wait for one and for nothing else."""
        for member in [member for member in self._waiting if member.run_key not in held]:
            if len(self._active) == self.num_slots:
                return
            self._waiting.remove(member)
            if self._report_if_trained(member):
                continue
            slot = min(set(range(self.num_slots)) - {run.slot for run in self._active})
            try:
                run = self._start(member, slot)
            except (DataError, AdapterError) as error:
                self.slots.clear(slot)
                self._refuse(member, error)
                continue
            self._active.append(run)
            self._active.sort(key=lambda active: active.slot)
            self._emit(run, "started", {})

    def next_batch(self) -> GroupBatch:
        """Take the next batch of every active adapter."""
        return GroupBatch.of(self._active)

    def forward_backward(self, batch: GroupBatch) -> dict[int, float]:
        """Add the batch's gradients to the slots; returns each slot's mean loss. Raises RankError where one row does not fit.

        It is done in micro-batches; where memory does not suffice, from the start again in smaller ones: same gradients.
        """
        assert self.slots.flat_grad_SP is not None
        own = batch.shares(self._ranks.size)[self._ranks.rank]
        longest = max(own.lengths, default=0)
        parts = self._ranks.together(lambda: self._micro_batches.within_memory(longest, lambda: self._forward_backward(own)))
        self._ranks.add_up(self.slots.flat_grad_SP)
        return {run.slot: sum(part[run.slot] for part in parts) for run in batch.runs}

    def _forward_backward(self, batch: GroupBatch) -> dict[int, float]:
        assert self.slots.flat_grad_SP is not None
        self.slots.flat_grad_SP.zero_()
        losses = {run.slot: 0.0 for run in batch.runs}
        for micro in self._micro_batches.cut(batch.lengths):
            rows = [batch.rows[i] for i in micro]
            losses_B = answer_losses(self.base, self.slots, rows, [batch.gold[i] for i in micro])
            weighted_B = losses_B * torch.tensor([batch.weights[i] for i in micro], device=self.base.device)
            weighted_B.sum().backward()  # type: ignore[no-untyped-call]
            for row, loss in zip(rows, weighted_B.tolist(), strict=True):
                assert row.slot is not None
                losses[row.slot] += loss
        return losses

    def optim_step(self, losses: dict[int, float]) -> None:
        """Clip, step and count every active adapter by itself; one whose loss is not finite ends as failed."""
        for run in list(self._active):
            if not math.isfinite(losses[run.slot]):
                self._fail(run, NOT_FINITE)
                continue
            rate = run.optim_step()
            run.losses.append(losses[run.slot])
            self._emit(run, "progress", {"train/loss": losses[run.slot], "train/learning_rate": rate})

    def save_states(self) -> None:
        """Write every active adapter's checkpoint."""
        if self._ranks.rank == 0:
            for run in self._active:
                save_state(run, self.slots)

    def export_adapter(self, run: AdapterRun) -> AdapterArtifact:
        """Write the best epoch's adapter with its card, canaries and temperature."""
        spec = run.member.spec
        if run.best_P is not None:
            with torch.no_grad():
                self.slots.flat_SP[run.slot] = run.best_P
        card = TaskCard(
            format_version=FORMAT_VERSION,
            task=spec.name,
            description=spec.description,
            base=spec.base,
            base_fingerprint=self.base.files.fingerprint,
            scorer_version=SCORER_VERSION,
            rank=spec.lora.rank,
            scaling=spec.lora.scaling,
            rslora=spec.lora.rslora,
            num_modules=len(run.module_names),
            canaries=self._canaries(run),
            temperature=self._temperature(run),
            max_new_tokens=spec.max_new_tokens,
            spec_hash=spec_hash(spec),
            data_fingerprint=run.member.data_fingerprint,
            **card_fields(run.prompt_format),
        )
        return self._ranks.from_first(lambda: write_artifact(Path(run.member.adapter_dir), card, self.slots.export(run.slot)))

    def _leave(self, stopped: Collection[str], held: Collection[str]) -> None:
        """Save these adapters and free their slots; those that are held wait for one again."""
        self._waiting = [member for member in self._waiting if member.run_key not in stopped]
        leaving = [run for run in self._active if run.member.run_key in {*stopped, *held}]
        if leaving:
            self.save_states()
        for run in leaving:
            self._release(run)
            if run.member.run_key in stopped:
                self._emit(run, "stopped", {})
            else:
                self._waiting.append(run.member)

    def _refuse(self, member: Member, error: Exception) -> None:
        self._on_event(TrainEvent("failed", member.spec.name, member.run_key, 0, 0, now_ms(), message=str(error)))

    def _report_if_trained(self, member: Member) -> bool:
        """A worker that died after this adapter was written starts again with it in the list; it must not train twice."""
        digest = self._ranks.from_first(lambda: digest_in(Path(member.adapter_dir)))
        if digest:
            self._on_event(TrainEvent("finished", member.spec.name, member.run_key, 0, 0, now_ms(), message=digest))
        return bool(digest)

    def _start(self, member: Member, slot: int) -> AdapterRun:
        spec = member.spec
        formats = PromptFormat.all_of(spec, self.base.family)
        labels = encode_labels(self.base, self.slots, formats[0])
        train_ids = [[self._ids_of(example, each) for each in formats] for example in member.train]
        select_ids = [self._ids_of(example, formats[0]) for example in member.select]
        train_labels, select_labels = (
            label_sets_of(self.base, spec, labels, examples) for examples in (member.train, member.select)
        )
        modules = self._modules_of[member.run_key]
        generator = torch.Generator().manual_seed(spec.train.seed)
        self.slots.fresh(slot, modules, spec.lora.rank, spec.lora.scaling, generator)
        self.slots.dropouts[slot] = spec.lora.dropout
        run = AdapterRun(
            member=member,
            slot=slot,
            prompt_format=formats[0],
            labels=labels,
            module_names=modules,
            optimizer=torch.optim.AdamW(
                [{"params": [half]} for half in self.slots.parameters(slot)], weight_decay=spec.train.weight_decay
            ),
            train_ids=train_ids,
            train_labels=train_labels,
            train_gold=[own.names.index(example.label) for own, example in zip(train_labels, member.train, strict=True)],
            select_ids=select_ids,
            select_labels=select_labels,
        )
        load_state(run, self.slots)
        if len(set(self._ranks.gather(run.step))) > 1:  # storage may show a node an old file for a while: Ray starts all again
            raise RuntimeError(f"workers see different checkpoints of {spec.name}: put the workspace on storage they share")
        self._prefix.reserve(slot, sum(map(len, chain(*train_ids, select_ids))))
        return run

    def _ids_of(self, example: Example, prompt_format: PromptFormat) -> tuple[int, ...]:
        return encode_prompt(prompt_format, example.columns, self.base.tokenizer).token_ids

    def _canaries(self, run: AdapterRun) -> list[Canary]:
        chosen = range(0, len(run.select_ids), max(1, len(run.select_ids) // NUM_CANARIES))[:NUM_CANARIES]
        token_rows = [run.select_ids[i] for i in chosen]
        label_sets: list[LabelSet] = [run.labels] * len(chosen)
        texts: Sequence[str | None] = [None] * len(chosen)
        limit = run.member.spec.max_new_tokens
        if limit is not None:
            rows = [ScoringRow(ids, run.slot, run.labels) for ids in token_rows]
            token_lists = self._ranks.from_first(lambda: generate(self.base, self.slots, rows, [limit] * len(rows)))
            written = [answer_text(self.base, ids) for ids in token_lists]
            texts, label_sets = written, [encode_answer(self.base, text, limit) for text in written]
        scores = self._score(run, token_rows, label_sets)
        return [
            Canary(columns=run.member.select[i].columns, scores=score.tolist(), text=text)
            for i, score, text in zip(chosen, scores, texts, strict=True)
        ]

    def _temperature(self, run: AdapterRun) -> float:
        if run.is_free_text:
            return 1.0
        gold = [run.labels.names.index(example.label) for example in run.member.select]
        return fit_temperature([scores.tolist() for scores in self._score(run, run.select_ids, run.select_labels)], gold)

    def _end_epoch(self, run: AdapterRun) -> None:
        try:
            self._judge_epoch(run)
        except CapacityError as error:
            self._fail(run, str(error))

    def _judge_epoch(self, run: AdapterRun) -> None:
        epoch, scores = run.step // run.steps_per_epoch, self._score(run, run.select_ids, run.select_labels)
        select_loss, metrics = self._ranks.from_first(lambda: run.select_result(scores))
        if not math.isfinite(select_loss):
            self._fail(run, NOT_FINITE)
            return
        # The loss breaks the many ties that a small select split has; of a free-text task it alone decides.
        value = next(iter(metrics.values()), 0.0)
        if (value, -select_loss) > run.best_result:
            run.best_result, run.best_epoch = (value, -select_loss), epoch
            run.best_P = self.slots.flat_SP[run.slot].clone()
        train_loss = sum(run.losses) / max(1, len(run.losses))
        run.losses.clear()
        self._emit(run, "epoch", {**metrics, "select/loss": select_loss, "train/epoch_loss": train_loss})
        patience = run.member.spec.train.early_stopping
        if run.step >= run.num_steps or (patience and epoch - run.best_epoch >= patience):
            self._finish(run)

    def _finish(self, run: AdapterRun) -> None:
        artifact = self.export_adapter(run)
        self._release(run)
        best = -run.best_result[1] if run.is_free_text else run.best_result[0]
        self._emit(run, "finished", {"select/best": best, "train/best_epoch": float(run.best_epoch)}, artifact.digest)
        Path(run.member.checkpoint_file).unlink(missing_ok=True)

    def _fail(self, run: AdapterRun, reason: str) -> None:
        self._release(run)
        self._emit(run, "failed", {}, reason)

    def _release(self, run: AdapterRun) -> None:
        self._active.remove(run)
        self._prefix.release(run.slot)
        self.slots.clear(run.slot)

    def _score(self, run: AdapterRun, token_rows: Sequence[tuple[int, ...]], label_sets: Sequence[LabelSet]) -> list[Tensor]:
        # An encoder has its labels' vectors already.
        reads_labels = self.base.family != "encoder"
        lengths = [
            len(ids) + (labels.tree.num_nodes if reads_labels else 0) for ids, labels in zip(token_rows, label_sets, strict=True)
        ]
        own = balanced_shares(lengths, self._ranks.size)[self._ranks.rank]
        own_lengths = [lengths[i] for i in own]

        def attempt() -> dict[int, Tensor]:
            scores: dict[int, Tensor] = {}
            for batch in self._micro_batches.cut(own_lengths):
                rows = [ScoringRow(token_rows[own[i]], run.slot, label_sets[own[i]]) for i in batch]
                for i, score in zip(batch, score_labels(self.base, self.slots, rows), strict=True):
                    scores[own[i]] = score.cpu().clone()  # a view would travel to the other ranks with its whole batch
            return scores

        with torch.no_grad():
            parts = self._ranks.together(lambda: self._micro_batches.within_memory(max(own_lengths, default=0), attempt))
        merged = {i: score for part in parts for i, score in part.items()}
        return [merged[i] for i in range(len(token_rows))]

    def _report_halved(self, max_tokens: int) -> None:
        for run in self._active:
            self._emit(run, "halved", {"train/micro_batch_tokens": float(max_tokens)})

    def _emit(self, run: AdapterRun, kind: str, metrics: dict[str, float], message: str = "") -> None:
        spec, steps = run.member.spec, (run.step, run.num_steps, now_ms())
        self._on_event(TrainEvent(kind, spec.name, run.member.run_key, *steps, metrics, message, spec.train.batch_size))
