"""MLflow's models-from-code file for the router: `mlflow.pyfunc.load_model("models:/auto@champion").predict([...])`.

MLflow runs this file when it loads a version; it checks the router against its base, canaries included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow

from multilora.base_model import load_base
from multilora.registry import ADAPTER_PATH
from multilora.task_router import read_router, routed_to
from serve.engine import Engine


class RouterModel(mlflow.pyfunc.PythonModel):
    """The router over its base, as a pyfunc model."""

    def load_context(self, context: Any) -> None:
        """Load the base and check the router against it; fails where the base is another one."""
        self._router = read_router(Path(context.artifacts[ADAPTER_PATH]))
        base = load_base(self._router.card.base)
        self._engine = Engine(base, num_slots=1, max_rank=1)
        self._router.check_base(base.files.fingerprint, self._engine.embed)

    def predict(self, context: Any, model_input: list[str], params: dict[str, Any] | None = None) -> list[str]:
        """Name the task of each text, or `(abstained)`."""
        rows = self._router.probabilities(model_input, self._engine.embed)
        return [routed_to(row, self._router.card.threshold) for row in rows]


mlflow.models.set_model(RouterModel())
