"""What a user would otherwise run: PEFT behind a plain FastAPI server, merged models behind it, or Ray Serve's multiplexing.

python benchmarks/rivals.py (set-adapter | merged | multiplexed) PORT FOLDER   # FOLDER/TASK-SEED/artifacts/adapter
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import ray
import torch
import uvicorn
from fastapi import FastAPI
from peft import PeftModel
from pydantic import BaseModel
from ray import serve as ray_serve
from starlette.requests import Request
from torch import Tensor

from multilora.artifact import read_artifact
from multilora.base_model import load_base
from multilora.prompt import encode_prompt
from orchestrator.plain_scoring import LabelScorer, with_adapter


class Question(BaseModel):
    """The same body as ours."""

    model: str
    input: str | list[str]


class Peft:
    """A base with PEFT adapters, or merged models: one task at a time."""

    def __init__(self, folder: Path, *, is_merged: bool = False) -> None:
        self.paths = {path.parents[1].name.rpartition("-")[0]: path for path in folder.glob("*-*/artifacts/adapter")}
        first, *_ = self.paths
        card = read_artifact(self.paths[first]).card
        self._base = load_base(card.base, "cpu")
        self._scorer = LabelScorer.of(self._base, card.prompt_format)
        self._names = [label for label, _ in card.labels]
        self._merged: dict[str, LabelScorer] = {}
        self._model: PeftModel | None = None
        if is_merged:
            for task, path in self.paths.items():
                model = with_adapter(load_base(card.base, "cpu").model, path).merge_and_unload().eval()
                self._merged[task] = replace(self._scorer, base=replace(self._base, model=model), model=model)
        else:
            self._model = with_adapter(self._base.model, self.paths[first], first)
            self._scorer = replace(self._scorer, model=self._model)

    def load(self, task: str) -> None:
        """Load a task's adapter, where it is not there yet."""
        if self._model is not None and task not in self._model.peft_config:
            self._model.load_adapter(self.paths[task], adapter_name=task)

    def probabilities(self, task: str, texts: Sequence[str]) -> list[dict[str, float]]:
        """One padded batch of one task."""
        if self._model is not None:
            self._model.set_adapter(task)
        probabilities_BL = self._scores(self._merged.get(task, self._scorer), texts).softmax(-1)
        return [dict(zip(self._names, row, strict=True)) for row in probabilities_BL.tolist()]

    def run_base(self, texts: Sequence[str]) -> None:
        """One padded batch through the base as transformers runs it."""
        assert self._model is not None
        with self._model.disable_adapter():
            self._scores(self._scorer, texts)

    @torch.inference_mode()
    def _scores(self, scorer: LabelScorer, texts: Sequence[str]) -> Tensor:
        tokenizer, prompt_format = self._base.tokenizer, scorer.prompt_format
        if prompt_format.family == "encoder":  # whose prompt is the text
            rows = tokenizer(list(texts), truncation=True, max_length=prompt_format.max_length_tokens)["input_ids"]
        else:
            rows = [encode_prompt(prompt_format, {"text": text}, tokenizer).token_ids for text in texts]
        parts = [scorer.scores(rows[first : first + scorer.max_rows]) for first in range(0, len(rows), scorer.max_rows)]
        return torch.cat(parts)


def plain_server(folder: Path, *, is_merged: bool) -> FastAPI:
    """A FastAPI server with one lock around the model."""
    app, peft, lock = FastAPI(), Peft(folder, is_merged=is_merged), threading.Lock()
    for task in peft.paths:
        peft.load(task)

    @app.post("/v1/classify")
    def classify(body: Question) -> dict[str, object]:
        texts = body.input if isinstance(body.input, list) else [body.input]
        with lock:
            rows = peft.probabilities(body.model, texts)
        return {"results": [{"probabilities": row} for row in rows]}

    @app.get("/readyz")
    def ready() -> dict[str, bool]:
        return {"is_ready": True}

    return app


@ray_serve.deployment(max_ongoing_requests=1000)
class Multiplexed:
    """Ray Serve as its documentation shows it: an adapter is a multiplexed model, requests are batched."""

    def __init__(self, folder: str) -> None:
        self.peft = Peft(Path(folder))

    @ray_serve.multiplexed(max_num_models_per_replica=16)
    async def adapter(self, task: str) -> str:
        """Load an adapter."""
        self.peft.load(task)
        return task

    @ray_serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def answer(self, asked: list[tuple[str, str]]) -> list[dict[str, float]]:
        """Answer a batch, one forward pass for each task in it."""
        found: dict[int, dict[str, float]] = {}
        for task in dict.fromkeys(task for task, _ in asked):
            places = [place for place, one in enumerate(asked) if one[0] == task]
            rows = self.peft.probabilities(task, [asked[place][1] for place in places])
            found |= dict(zip(places, rows, strict=True))
        return [found[place] for place in range(len(asked))]

    async def __call__(self, request: Request) -> dict[str, object]:
        """Answer one text."""
        if request.url.path == "/readyz":
            return {"is_ready": True}
        task = await self.adapter(ray_serve.get_multiplexed_model_id())
        body = await request.json()
        return {"results": [{"probabilities": await self.answer((task, body["input"]))}]}


def main() -> None:
    """Serve until killed."""
    kind, port, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(os.cpu_count() or 1)
    if kind == "multiplexed":
        ray.init(address="local")
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        application = Multiplexed.options(ray_actor_options={"num_cpus": os.cpu_count() or 1}).bind(str(folder))
        ray_serve.run(application, route_prefix="/")
        threading.Event().wait()
    else:
        app = plain_server(folder, is_merged=kind == "merged")
        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
