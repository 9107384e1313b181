"""Write task files for public data sets beside this checkout, so that `orchestrator compare` can be run on them.

python benchmarks/public_tasks.py FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import yaml

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "tasks"
BASE = "sentence-transformers/all-MiniLM-L6-v2"
SIZES = {"train": 200, "select": 50, "gate": 400}
QUESTIONS = {
    "snips": "Read what somebody says to an assistant. What does the speaker want?",
    "scicite": "Read a sentence of a paper that cites another work. Why does it cite it?",
    "rotten_tomatoes": "Read a sentence of a film review. What does the critic think of the film?",
}
LABELS = {
    "snips": {
        "add to playlist": "add a song or artist to a playlist",
        "book restaurant": "book a table",
        "get weather": "ask for the weather",
        "play music": "hear a song, an artist or a kind of music",
        "rate book": "give a rating to a book",
        "search creative work": "look for a film, book, game or song",
        "search screening event": "ask for cinema showtimes",
    },
    "scicite": {
        "background": "the citation gives background information",
        "method": "it is used for a method, tool or data",
        "result": "it compares results",
    },
    "rotten_tomatoes": {"positive": "favourable opinion", "negative": "unfavourable opinion"},
}
"""Labels and meanings as each data set's README gives them."""
TRAIN = {"epochs": 4, "learning_rate": 2e-3, "max_length": 192}
"""As in the demo's task files."""


def main() -> int:
    """Write one spec and three files of rows for every data set that is there."""
    if len(sys.argv) != 2 or not SHARED.is_dir():
        print(f"usage: python benchmarks/public_tasks.py FOLDER, with the data sets in {SHARED}", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in QUESTIONS:
        print(write_task(folder, name))
    return 0


def write_task(folder: Path, name: str) -> Path:
    """Write <name>.yaml and its splits: training rows drawn from the set's train file, gate rows from its test file."""
    rows = _drawn(SHARED / name / "train.jsonl", SIZES["train"] + SIZES["select"])
    splits = {
        "train": rows[: SIZES["train"]],
        "select": rows[SIZES["train"] :],
        "gate": _drawn(SHARED / name / "test.jsonl", SIZES["gate"]),
    }
    for split, chosen in splits.items():
        (folder / f"{name}-{split}.jsonl").write_text("".join(chosen), encoding="utf-8")
    spec = {
        "name": name.replace("_", "-"),
        "base": {"model": BASE},
        "data": {split: f"{name}-{split}.jsonl" for split in splits},
        "instruction": f"{QUESTIONS[name]}\n{{labels}}\nText: {{text}}\nAnswer:",
        "labels": LABELS[name],
        "train": TRAIN,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return file


def _drawn(file: Path, num: int) -> list[str]:
    """Draw lines at random, of the same text only the first; the same ones in every run."""
    with file.open(encoding="utf-8") as stream:
        texts = {json.loads(line)["text"]: line for line in reversed(list(stream))}
    return random.Random(0).sample(sorted(texts.values()), num)


if __name__ == "__main__":
    sys.exit(main())
