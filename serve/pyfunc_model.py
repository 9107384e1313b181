"""MLflow's models-from-code file for one adapter: `mlflow.pyfunc.load_model("models:/task@champion").predict([...])`.

MLflow runs this file when it loads a version; it binds the adapter to its base through the serving engine, canaries included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow

from multilora.artifact import read_artifact
from multilora.base_model import load_base
from multilora.registry import ADAPTER_PATH
from serve.engine import Engine, Work


class AdapterModel(mlflow.pyfunc.PythonModel):
    """One adapter over its base, as a pyfunc model."""

    def load_context(self, context: Any) -> None:
        """Load the base and bind the adapter; fails where the base is another one."""
        artifact = read_artifact(Path(context.artifacts[ADAPTER_PATH]))
        self._engine = Engine(load_base(artifact.card.base), num_slots=1, max_rank=artifact.card.rank)
        self._key = self._engine.bind(artifact, version=0)

    def predict(self, context: Any, model_input: list[str], params: dict[str, Any] | None = None) -> list[str]:
        """Answer each text with one label, or with the text of a free-text task."""
        answers = self._engine.classify([Work(self._key, self._engine.prompt(self._key, text)) for text in model_input])
        return [answer.label for answer in answers]


mlflow.models.set_model(AdapterModel())
