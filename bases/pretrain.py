"""Make t5-mini: a small T5, pretrained on open text and tuned on open instructions, from nothing to a folder that loads.

    python bases/pretrain.py --data DIR --out DIR --minutes 115

The same command goes on where it was killed. What happens, in order: read the text and drop what overlaps with the judging
tasks; make a tokenizer of the commonest pieces of a sentence encoder, the teacher; let the teacher give sentences their vectors
and say which phrases fit them; fit the T5's encoder to the teacher's layers and its decoder to those phrases; train on the
teacher's states and by span corruption, then mostly on instructions, with a learning rate that is zero when the minutes end;
export. On a GPU it computes in bf16, on a CPU in float32. Beside other
work on the same cores set OMP_WAIT_POLICY=passive: threads that wait by spinning took three quarters of the speed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout's packages, also when run as a script

from bases.corpus import build_tokenizer, encode_lines, mixed_lines, read_texts, save_array
from bases.heldout import Heldout
from bases.mixture import Mixture, label_counts, read_mixture, split_sentences
from bases.model import MINI, SMALL
from bases.overlap import JudgingTexts
from bases.teacher import TEACHER, Matches, choose_phrases, choose_sentences, label_sentences
from bases.training import Prepared, Settings, Show, Training
from multilora.base_model import load_base
from multilora.spec import BaseSpec


def prepare(settings: Settings, say: Callable[[str], None], show: Show) -> Prepared:
    """Read the data, drop what overlaps, train the tokenizer, tokenise and ask the teacher; what takes long is kept in `out`."""
    files = (settings.out / name for name in ("tokenizer", "tokens.npy", "vectors.npy", "matches.json.xz"))
    folder, tokens_file, vectors_file, matches_file = files
    texts, mixture = read_clean(settings, say)
    lines = mixed_lines(texts, settings.seed)
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        if settings.start:
            PreTrainedTokenizerFast.from_pretrained(settings.start).save_pretrained(partial)
        else:
            say(f"choosing the tokenizer's pieces by {len(lines)} lines")
            teacher = load_base(BaseSpec(model=TEACHER)).tokenizer
            build_tokenizer(teacher, lines, settings.size.vocab_size).save_pretrained(partial)
        os.replace(partial, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if not tokens_file.exists():
        save_array(encode_lines(tokenizer, lines), tokens_file)
    tokens = np.load(tokens_file, mmap_mode="r")
    say(f"{len(tokens) / 1e6:.1f}M tokens of text, {len(tokens) / sum(len(line.split()) for line in lines):.2f} a word")
    if not matches_file.exists() and settings.num_matches:
        sentences = choose_sentences(texts, split_sentences, settings.num_matches, settings.seed)
        phrases = choose_phrases(label_counts(mixture), mixture.words, sentences)
        say(f"matching {len(sentences)} sentences with {len(phrases)} phrases by {TEACHER}")
        matches, labelled_NH = label_sentences(sentences, phrases, settings.seed, show)
        save_array(labelled_NH.half().numpy(), vectors_file)
        matches.write(matches_file)
    mixture = replace(mixture, matches=Matches.read(matches_file))
    vectors_NH = np.load(vectors_file, mmap_mode="r") if matches_file.exists() else np.empty((0, 0), dtype=np.float16)
    return Prepared(tokenizer, tokens, mixture, vectors_NH, Heldout.read(settings.data, settings.heldout_rows))


def read_clean(settings: Settings, say: Callable[[str], None]) -> tuple[dict[str, list[str]], Mixture]:
    """Read corpus and instructions without what shares text with the judging tasks; overlap.json says how much that was."""
    report = settings.out / "overlap.json"
    is_known = report.exists()
    dropped: list[str] = json.loads(report.read_text(encoding="utf-8"))["dropped"] if is_known else []
    known = frozenset(dropped)
    tests = JudgingTexts(frozenset(), frozenset(), 0) if is_known else JudgingTexts.read(settings.data)

    def is_clean(text: str) -> bool:
        if text in known:
            return False
        if tests.has_none_of(text):
            return True
        dropped.append(text)
        return False

    texts = read_texts(settings.data, settings.corpus_part, settings.seed)
    num_lines = sum(map(len, texts.values()))
    if known or not is_known:
        texts = {name: [line for line in lines if is_clean(line)] for name, lines in texts.items()}
    num_lines_dropped = len(dropped)
    mixture = read_mixture(settings.data, texts, is_clean, settings.max_characters)
    if not is_known:
        counts = {"test_texts": tests.num_texts, "corpus_lines": num_lines, "corpus_lines_dropped": num_lines_dropped,
                  "instruction_rows": sum(map(len, mixture.rows.values())),
                  "instruction_rows_dropped": len(dropped) - num_lines_dropped}  # fmt: skip
        say(f"overlap with the judging tasks: {json.dumps(counts)}")
        report.write_text(json.dumps({**counts, "dropped": dropped}, indent=1) + "\n", encoding="utf-8")
    return texts, mixture


def export(training: Training, folder: Path) -> None:
    """Write the folder that transformers and this project load: bf16 weights, config, tokenizer."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    deepcopy(training.model).to(torch.bfloat16).save_pretrained(partial)
    training.prepared.tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


@contextmanager
def shown_progress() -> Iterator[tuple[Callable[[str], None], Show]]:
    """Show a bar where a person watches, and plain lines where a file does."""
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        yield console.print, lambda progress, line: console.print(f"{progress:6.1%} {line}")
        return
    columns = (BarColumn(), TextColumn("{task.percentage:.1f}% {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("preparing", total=1.0)
        yield bar.console.print, lambda progress, line: bar.update(task, completed=progress, description=line)


def settings_of(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line."""
    is_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = os.environ.get("PRETRAIN_DATA")
    parser.add_argument("--data", type=Path, default=where, required=where is None, help="folder with corpus/ and instructions/")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and the exported base")
    parser.add_argument("--start", type=Path, help="an exported base (OUT/model) to train further")
    parser.add_argument("--minutes", type=float, default=115, help="time from start to the last step")
    parser.add_argument("--steps", type=int, help="train so many steps instead: the result then depends on the seed alone")
    parser.add_argument("--small", action="store_true", help="a tiny model on a part of the text, which proves the recipe")
    parser.add_argument("--corpus-part", type=float, help="part of the text that is read")
    parser.add_argument(
        "--instructions-from", type=float, default=Settings.instructions_from, help="progress up to which none are shown"
    )
    parser.add_argument(
        "--instructions-share", type=float, default=Settings.instructions_share, help="part of the batches after that"
    )
    parser.add_argument("--matrix-rate", type=float, default=Settings.matrix_rate, help="learning rate of the layers' matrices")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate, help="relative to a tensor's first values")
    parser.add_argument("--max-characters", type=int, default=900 if is_gpu else 400, help="longest input of an instruction row")
    parser.add_argument("--batch-tokens", type=int, default=65536 if is_gpu else 1024)
    parser.add_argument("--loaders", type=int, default=8 if is_gpu else 0, help="processes that prepare batches")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--matches", type=int, help="sentences of the text that the teacher labels (0: none)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    part = given.corpus_part or (0.05 if given.small else 1.0)
    num_matches = (1000 if given.small else 200_000 if is_gpu else 100_000) if given.matches is None else given.matches
    return Settings(
        data=given.data, out=given.out, size=SMALL if given.small else MINI, minutes=given.minutes, start=given.start,
        corpus_part=part, steps=given.steps, instructions_from=given.instructions_from,
        instructions_share=given.instructions_share,
        matrix_rate=given.matrix_rate, learning_rate=given.learning_rate, batch_tokens=given.batch_tokens, seed=given.seed,
        num_loaders=given.loaders, compile=given.compile, max_characters=given.max_characters, num_matches=num_matches,
    )  # fmt: skip


def main() -> None:
    """Run the recipe."""
    started = time.monotonic()
    settings = settings_of()
    settings.out.mkdir(parents=True, exist_ok=True)
    with shown_progress() as (say, show):
        prepared = prepare(settings, say, show)
        training = Training(settings, prepared, say, show, started=started)
        say(f"{training.model.num_parameters() / 1e6:.1f}M parameters on {training.device}")
        training.run()
        training.save()
        export(training, settings.out / "model")
        say(f"exported {settings.out / 'model'}")
        training.judge()


if __name__ == "__main__":
    main()
