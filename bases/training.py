"""Train a T5 on three streams of batches within a time: optimiser, schedule, checkpoints, log.

Dims: V vocabulary, H hidden, B rows, T input positions, U target positions.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

from bases.batches import (
    MAX_SENTENCE_TOKENS,
    PAD,
    SPAN_INPUT_TOKENS,
    TARGET_LENGTHS,
    Batch,
    InstructionChunks,
    SentenceChunks,
    SpanChunks,
    padded,
    stream,
)
from bases.corpus import sentinel_id
from bases.heldout import Heldout, evaluate
from bases.losses import options_loss, sentence_loss
from bases.mixture import Mixture
from bases.model import Size, build_model, build_optimizers, compile_layers
from bases.readout import give_readout
from bases.teacher import TEACHER
from bases.transplant import PieceTeacher, transplant_teacher
from multilora.errors import DataError

Show = Callable[[float, str], None]
"""Shows progress (0 to 1) and a line about it."""


@dataclass(frozen=True)
class Settings:
    """One run. `decisive` settings must be those of the checkpoint that a run goes on from; the rest may suit the machine."""

    data: Path
    out: Path
    size: Size
    minutes: float
    start: Path | None = None
    """An exported base to train further, with its tokenizer; without one the run begins with the teacher."""
    corpus_part: float = 1.0
    steps: int | None = None
    """Train so many steps instead of minutes; the result then depends on nothing but the seed."""
    instructions_from: float = 0.35
    """Progress (0 to 1) up to which there are no instructions: the encoder learns to follow the teacher."""
    instructions_share: float = 0.65
    """Part of the batches after that which are instructions."""
    matrix_rate: float = 3e-3
    """Learning rate of the layers' matrices on a GPU, by Muon, in AdamW's scale."""
    learning_rate: float = 3e-3
    """Of all else, by AdamW, relative to the root mean square of a tensor's first values, as in Adafactor."""
    max_characters: int = 900
    """Of the input of an instruction row; the longest cost the most and teach the least."""
    batch_tokens: int = 1024
    seed: int = 0
    checkpoint_s: float = 180
    checkpoint_steps: int | None = None
    log_s: float = 30
    evaluate_s: float = 1500
    heldout_rows: int = 6
    num_matches: int = 0
    """Sentences that the teacher labels."""
    num_loaders: int = 0
    """Processes that prepare batches; 0 prepares them between the steps."""
    compile: bool = False

    def decisive(self) -> dict[str, Any]:
        """Return what a checkpoint depends on."""
        kept = ("size", "corpus_part", "steps", "instructions_from", "instructions_share", "matrix_rate", "learning_rate",
                "max_characters", "seed")  # fmt: skip
        return {name: asdict(self)[name] for name in kept}


WARMUP, DECAY_FROM = 0.02, 0.3
SENTENCE_LOSS_WEIGHT = 10
SENTENCES_SHARE = 0.9
"""Of what is no instruction; the rest are spans."""


@dataclass(frozen=True)
class Prepared:
    """What training reads."""

    tokenizer: PreTrainedTokenizerFast
    tokens: NDArray[np.uint16]
    mixture: Mixture
    vectors_NH: NDArray[np.float16]
    """The teacher's, of the sentences in `mixture.matches`; none where it was not asked."""
    heldout: Heldout


@dataclass(frozen=True)
class Position:
    """Where a run stands; with weights and optimiser state it is the whole checkpoint."""

    step: int = 0
    elapsed_s: float = 0.0
    begun_s: float = 0.0
    """Time that preparing took before the first step; both count from the start of the run that began."""
    num_tokens: int = 0
    spans: tuple[int, int] = (0, 0)
    """The next batch of each stream: (chunk, batch in it)."""
    sentences: tuple[int, int] = (0, 0)
    instructions: tuple[int, int] = (0, 0)


def rate_factor(progress: float) -> float:
    """Rise, stay, and fall to zero at the end."""
    return max(0.0, min(1.0, progress / WARMUP + 1e-3, (1 - progress) / (1 - DECAY_FROM)))


@dataclass
class Window:
    """Losses since the last line of the log."""

    since: float
    first_token: int
    losses: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, loss: Tensor) -> None:
        """Note the loss of one step."""
        self.losses[kind].append(loss)


class Training:
    """Model, optimiser and position of one run."""

    def __init__(
        self, settings: Settings, prepared: Prepared, say: Callable[[str], None], show: Show, started: float | None = None
    ) -> None:
        """Begin, or go on where the last checkpoint in `out` stands; `started` is when the minutes began."""
        self.settings, self.prepared, self.say, self.show = settings, prepared, say, show
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build_model(settings.size, settings.seed)
        self.teacher = PieceTeacher.load(prepared.tokenizer, self.device)
        self.file = settings.out / "checkpoint.safetensors"
        if settings.start:
            self.model = T5ForConditionalGeneration.from_pretrained(settings.start, dtype=torch.float32).train()
        elif not self.file.exists():
            self._begin_with_teacher()
        self.optimizers = build_optimizers(self.model.to(self.device), settings.learning_rate, settings.matrix_rate)
        if settings.compile:
            compile_layers(self.model)
            self._compile_now()
        begun_s = 0.0 if started is None else time.monotonic() - started
        self.position = self._load() if self.file.exists() else Position(elapsed_s=begun_s, begun_s=begun_s)

    def _begin_with_teacher(self) -> None:
        prepared, seed = self.prepared, self.settings.seed
        self.say(f"fitting the encoder to {TEACHER}")
        transplant_teacher(self.model.to(self.device), self.teacher, prepared.tokenizer, prepared.mixture.sentences, seed)
        if matches := prepared.mixture.matches.rows:
            self.say(f"fitting the decoder to the phrases of {len(matches)} sentences")
            vectors_NH = torch.from_numpy(np.array(prepared.vectors_NH))
            give_readout(self.model, prepared.tokenizer, vectors_NH, prepared.mixture.matches, seed)

    def run(self, stop_at: int | None = None) -> None:
        """Train to the end, or as if killed before step `stop_at`."""
        settings, position = self.settings, self.position
        spans = SpanChunks(self.prepared.tokens, sentinel_id(self.prepared.tokenizer), settings.batch_tokens, settings.seed)
        instructions = InstructionChunks(self.prepared.mixture, self.prepared.tokenizer, settings.batch_tokens, settings.seed)
        texts = [row.text for row in self.prepared.mixture.matches.rows]
        sentences = SentenceChunks(texts, self.prepared.vectors_NH, self.prepared.tokenizer, settings.batch_tokens, settings.seed)
        streams = {
            "spans": stream(spans, position.spans, settings.num_loaders),
            "sentences": stream(sentences, position.sentences, settings.num_loaders),
            "instructions": stream(instructions, position.instructions, settings.num_loaders),
        }
        window = Window(time.monotonic(), position.num_tokens)
        started = time.monotonic() - position.elapsed_s
        saved_s, judged_s = position.elapsed_s, position.elapsed_s
        while (progress := self.progress()) < 1 and self.position.step != stop_at:
            kind = self.kind_of_step(progress)
            batch, following = next(streams[kind])
            window.add(kind, self.train_step(batch, rate_factor(progress)))
            place: dict[str, Any] = {kind: following}
            self.position = replace(
                self.position, step=self.position.step + 1, elapsed_s=time.monotonic() - started,
                num_tokens=self.position.num_tokens + batch.num_tokens, **place,
            )  # fmt: skip
            if time.monotonic() - window.since > settings.log_s:
                self._report(window)
                window = Window(time.monotonic(), self.position.num_tokens)
            if self._is_checkpoint_due(self.position.elapsed_s - saved_s):
                self.save()
                saved_s = self.position.elapsed_s
            if self.position.elapsed_s - judged_s > settings.evaluate_s:
                self.judge()
                judged_s = self.position.elapsed_s

    def progress(self) -> float:
        """Part of the run that is done, by steps where they are given, else by time."""
        if self.settings.steps is not None:
            return self.position.step / self.settings.steps
        return (self.position.elapsed_s - self.position.begun_s) / max(self.settings.minutes * 60 - self.position.begun_s, 1)

    def kind_of_step(self, progress: float) -> str:
        """Choose what the next step trains on; the choice depends on seed and step, not on what was drawn before."""
        share = self.settings.instructions_share if progress >= self.settings.instructions_from else 0.0
        draw = np.random.default_rng((self.settings.seed, 1, self.position.step)).random()
        if draw < share:
            return "instructions"
        is_sentence = draw < share + (1 - share) * SENTENCES_SHARE and len(self.prepared.vectors_NH)
        return "sentences" if is_sentence else "spans"

    def train_step(self, batch: Batch, factor: float) -> Tensor:
        """Train on one batch; the loss is the mean over its target tokens. It stays on the device: reading it would wait."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        loss = self._loss(batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _loss(self, batch: Batch) -> Tensor:
        ids_BT, targets_BU = (ids.to(self.device).long() for ids in (batch.ids_BT, batch.targets_BU))
        mask_BT = (ids_BT != PAD).long()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            if batch.vectors_RH is not None:
                vectors_RH = batch.vectors_RH.to(self.device).float()
                return SENTENCE_LOSS_WEIGHT * sentence_loss(self.model, self.teacher, ids_BT, mask_BT, vectors_RH)
            if batch.others is not None:
                return options_loss(self.model, ids_BT, mask_BT, targets_BU, batch.others)
            loss: Tensor = self.model(input_ids=ids_BT, attention_mask=mask_BT, labels=targets_BU, use_cache=False).loss
        return loss

    def _compile_now(self) -> None:
        """Compile forward and backward pass before the first step: the learning rate goes by the clock."""
        for length, width in ((SPAN_INPUT_TOKENS, TARGET_LENGTHS[2]), (MAX_SENTENCE_TOKENS, TARGET_LENGTHS[0])):
            loss = self._loss(padded("", [], max(1, self.settings.batch_tokens // length), length, width))
            torch.autograd.backward(loss)
            self.model.zero_grad(set_to_none=True)

    def judge(self) -> None:
        """Log the accuracy on held-out rows."""
        self.model.eval()
        with torch.compiler.set_stance("force_eager"):  # what is compiled would be compiled again for evaluation
            result = evaluate(self.model, self.prepared.tokenizer, self.prepared.heldout)
        self.model.train()
        self._log({"step": self.position.step, "elapsed_s": round(self.position.elapsed_s), "heldout": result})
        self.say(f"held-out accuracy {result['seen']} (majority {result['seen_majority']}), "
                 f"on tasks never trained {result['unseen']} (majority {result['unseen_majority']})")  # fmt: skip

    def save(self) -> None:
        """Write weights, optimiser state and position as one safetensors file that is whole or not there."""
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{name}": value for name, value in state.items()}
        peaks = [[group["peak"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        header = {"position": asdict(self.position), "settings": self.settings.decisive(), "peaks": peaks}
        partial = self.file.with_suffix(".partial")
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, partial,
                  {name: json.dumps(value) for name, value in header.items()})  # fmt: skip
        os.replace(partial, self.file)

    def _load(self) -> Position:
        with safe_open(self.file, framework="pt", device="cpu") as saved:
            header = {name: json.loads(value) for name, value in saved.metadata().items()}
            given = json.loads(json.dumps(self.settings.decisive()))
            if {name: header["settings"].get(name) for name in given} != given:
                raise DataError(f"{self.file} was written with other settings: {header['settings']}; choose another --out")
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118  no mapping
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(tensors[f"model.{name}"])
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, index, part = name.split(".")
                states[int(number)].setdefault(int(index), {})[part] = value
        for optimizer, state, peaks in zip(self.optimizers, states, header["peaks"], strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["peak"] = peak  # it went by first values
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.say(f"going on from step {header['position']['step']}")
        position: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in header["position"].items()}
        return Position(**position)

    def _is_checkpoint_due(self, since_s: float) -> bool:
        if self.settings.checkpoint_steps is not None:
            return self.position.step % self.settings.checkpoint_steps == 0
        return since_s > self.settings.checkpoint_s

    def _report(self, window: Window) -> None:
        progress = self.progress()
        speed = (self.position.num_tokens - window.first_token) / (time.monotonic() - window.since)
        left_s = (self.position.elapsed_s - self.position.begun_s) * (1 - progress) / max(progress, 1e-9)
        losses = {f"loss_{kind}": round(float(torch.stack(found).mean()), 4) for kind, found in window.losses.items()}
        record = {"step": self.position.step, "elapsed_s": round(self.position.elapsed_s), "progress": round(progress, 4),
                  **losses, "tokens_per_s": round(speed), "num_tokens": self.position.num_tokens}  # fmt: skip
        self._log(record)
        shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self.show(progress, f"step {self.position.step} {shown} {speed:.0f} tokens/s, {left_s / 60:.0f} min left")

    def _log(self, record: Mapping[str, Any]) -> None:
        with (self.settings.out / "log.jsonl").open("a", encoding="utf-8") as stream_:
            stream_.write(json.dumps(record) + "\n")
