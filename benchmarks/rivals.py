"""What a user would otherwise run: PEFT behind a plain FastAPI server, merged models behind it, or Ray Serve's multiplexing.

python benchmarks/rivals.py (set-adapter | merged | multiplexed) PORT FOLDER   # FOLDER/TASK-SEED/artifacts/adapter
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F  # noqa: N812
import uvicorn
from fastapi import FastAPI
from peft import PeftModel
from pydantic import BaseModel
from ray import serve as ray_serve
from starlette.requests import Request
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from benchmarks.serving_tasks import FORMAT
from multilora.base_files import EMBEDDED, find_base
from multilora.prompt import label_wordings
from multilora.spec import BaseSpec

SCALE = 20.0
"""Of the cosine; multilora.scoring has the same."""


class Question(BaseModel):
    """The same body as ours."""

    model: str
    input: str | list[str]


class Peft:
    """MiniLM with PEFT adapters: one task at a time."""

    def __init__(self, folder: Path, *, is_merged: bool = False) -> None:
        base_folder = find_base(BaseSpec(model=next(iter(EMBEDDED)))).folder
        self.tokenizer = AutoTokenizer.from_pretrained(base_folder)
        base = AutoModel.from_pretrained(base_folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            self.labels_LH = self._pooled(base, label_wordings(FORMAT.labels))
        self.paths = {path.parents[1].name.rpartition("-")[0]: path for path in folder.glob("*-*/artifacts/adapter")}
        self.merged: dict[str, PreTrainedModel] = {}
        self.model: PeftModel | None = None
        if is_merged:
            for task, path in self.paths.items():
                fresh = AutoModel.from_pretrained(base_folder, dtype=torch.float32)
                self.merged[task] = PeftModel.from_pretrained(fresh, path).merge_and_unload().eval()
        else:
            first, *_ = self.paths
            self.model = PeftModel.from_pretrained(base, self.paths[first], adapter_name=first).eval()

    def load(self, task: str) -> None:
        """Load a task's adapter, where it is not there yet."""
        if self.model is not None and task not in self.model.peft_config:
            self.model.load_adapter(self.paths[task], adapter_name=task)

    @torch.inference_mode()
    def probabilities(self, task: str, texts: list[str]) -> list[dict[str, float]]:
        """One padded batch of one task."""
        model = self.merged.get(task) or self.model
        if isinstance(model, PeftModel):
            model.set_adapter(task)
        scores_BL = SCALE * self._pooled(model, texts) @ self.labels_LH.T
        names = [label for label, _ in FORMAT.labels]
        return [dict(zip(names, row, strict=True)) for row in scores_BL.softmax(-1).tolist()]

    def _pooled(self, model: torch.nn.Module | None, texts: list[str]) -> Tensor:
        assert model is not None
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=FORMAT.max_length_tokens, return_tensors="pt")
        hidden_BTH = model(**batch).last_hidden_state
        weights_BT1 = batch["attention_mask"][..., None].float()
        return F.normalize((hidden_BTH * weights_BT1).sum(1) / weights_BT1.sum(1), dim=-1)


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
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        application = Multiplexed.options(ray_actor_options={"num_cpus": os.cpu_count() or 1}).bind(str(folder))
        ray_serve.run(application, route_prefix="/")
        threading.Event().wait()
    else:
        app = plain_server(folder, is_merged=kind == "merged")
        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
