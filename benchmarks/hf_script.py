"""The baseline of submit.py: what one writes for one task without an orchestrator, with transformers' Trainer and PEFT.

Trains a LoRA classifier, keeps the best epoch by the select rows, saves the adapter, and prints JSON with its accuracy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

SPLITS = ("train", "select", "gate")


def main() -> None:
    """Train, choose, predict, save."""
    given = arguments()
    set_seed(0)
    rows = {split: [json.loads(line) for line in getattr(given, split).open(encoding="utf-8")] for split in SPLITS}
    labels = sorted({row["label"] for split in SPLITS for row in rows[split]})
    tokenizer = AutoTokenizer.from_pretrained(given.base)

    def encode(split: str) -> Dataset:
        encoded = tokenizer([row["text"] for row in rows[split]], truncation=True, max_length=given.max_length)
        return Dataset.from_dict({**encoded, "labels": [labels.index(row["label"]) for row in rows[split]]})

    model = AutoModelForSequenceClassification.from_pretrained(given.base, num_labels=len(labels))
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=given.rank, lora_alpha=given.alpha, target_modules="all-linear",
        modules_to_save=["classifier"],
    )  # fmt: skip
    trainer = Trainer(
        get_peft_model(model, lora),
        TrainingArguments(
            output_dir=str(given.output), num_train_epochs=given.epochs, learning_rate=given.learning_rate,
            per_device_train_batch_size=given.batch_size, per_device_eval_batch_size=64, eval_strategy="epoch",
            save_strategy="epoch", save_total_limit=1, save_only_model=True, load_best_model_at_end=True,
            metric_for_best_model="accuracy", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=encode("train"),
        eval_dataset=encode("select"),
        compute_metrics=accuracy,
    )  # fmt: skip
    trained = trainer.train()
    gate, select = (trainer.predict(encode(split)).metrics["test_accuracy"] for split in ("gate", "select"))
    trainer.save_model(str(given.output / "adapter"))
    print(json.dumps({"accuracy": gate, "select_accuracy": select, "training_s": trained.metrics["train_runtime"]}))


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def arguments() -> argparse.Namespace:
    """Files and settings."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", *SPLITS, "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("epochs", "batch-size", "max-length", "rank"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("learning-rate", "alpha"):
        parser.add_argument(f"--{name}", type=float, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
