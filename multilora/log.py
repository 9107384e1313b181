"""Logging set-up for the entry points (command line, worker, replica). No other module may configure logging."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path


def setup_logging(level: str | None = None, log_file: str | None = None) -> None:
    """Send `event key=value` lines to stderr, and to a file, at `level` (default: ORCHESTRATOR_LOG, else WARNING)."""
    chosen = (level or os.environ.get("ORCHESTRATOR_LOG") or "WARNING").upper()
    handlers: list[logging.Handler] = [logging.StreamHandler(), *([logging.FileHandler(log_file)] if log_file else [])]
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=chosen, format=form, handlers=handlers, force=True)
    # Progress bars for files of a few kilobytes tell nobody anything.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for noisy in ("transformers", "bitsandbytes", "datasets", "httpx", "mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    # Adapter gradients are views into one flat matrix on purpose; autograd would prefer them dense.
    warnings.filterwarnings("ignore", message=".*gradient layout contract.*")


def log_apart(name: str, file: Path) -> None:
    """Append the lines of one logger to a file of its own instead; processes that share it append whole lines."""
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.propagate = False
