"""Tiny bases of every family, loaded fresh for each use, and random adapters for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

# No test touches the network; set before transformers and huggingface_hub read it.
os.environ["HF_HUB_OFFLINE"] = "1"
# Waiting threads sleep; torch reads this when it is imported.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import pytest
import torch
from tiny_adapters import TinyTask, write_tiny_adapter
from tiny_bases import BUILDERS

from multilora.artifact import AdapterArtifact
from multilora.base_model import FrozenBase, load_base
from multilora.lora import AdapterSlots, AdapterTensors
from multilora.spec import BaseSpec
from multilora.target_modules import match_modules

if TYPE_CHECKING:
    from multilora.registry import Registry

FAMILIES = ("seq2seq", "encoder", "causal")

BaseFolder = Callable[[str], Path]
FreshBase = Callable[..., FrozenBase]
RandomAdapter = Callable[..., AdapterTensors]
TinyAdapter = Callable[..., AdapterArtifact]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Laws first: the end-to-end tests, minutes each, come last."""
    items.sort(key=lambda item: "e2e" in item.keywords)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # On a busy machine the threads of a tiny product wait for each other: 3 s a forward instead of 10 ms.
    torch.set_num_threads(1)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family of bases in turn."""
    return request.param


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> BaseFolder:
    """Folder of a tiny base of the given kind (a family, or qwen2), built once a session. Do not change it: copy it."""
    root = tmp_path_factory.mktemp("bases")

    def folder_of(kind: str) -> Path:
        folder = root / kind
        return folder if folder.exists() else BUILDERS[kind](folder)

    return folder_of


@pytest.fixture(scope="session")
def fresh_base(base_folder: BaseFolder) -> FreshBase:
    """Make a tiny base of its own for the caller, who may wrap it: fresh_base("encoder", dtype="bfloat16")."""

    @cache
    def load(spec: BaseSpec) -> FrozenBase:
        return load_base(spec, "cpu")

    def copy_of(kind: str, **spec: str) -> FrozenBase:
        # Hundreds of tests ask for one; a copy takes a fifth of the time of loading.
        base = load(BaseSpec(model=str(base_folder(kind)), **spec))
        return replace(base, model=deepcopy(base.model))

    return copy_of


@pytest.fixture(scope="session")
def random_adapter() -> RandomAdapter:
    """Make an adapter whose both halves are far from zero: random_adapter(slots, rank=4, seed=1, names=[...])."""

    def make(slots: AdapterSlots, rank: int, seed: int, names: list[str] | None = None) -> AdapterTensors:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name in names or slots.layers:
            layer = slots.layers[name]
            a_RI = torch.randn(rank, layer.in_features, generator=generator) * layer.in_features**-0.5
            b_OR = torch.randn(layer.out_features, rank, generator=generator) * (0.2 / rank)
            tensors[name] = (a_RI, b_OR)
        return tensors

    return make


@pytest.fixture(scope="session")
def tiny_adapter(fresh_base: FreshBase, random_adapter: RandomAdapter, tmp_path_factory: pytest.TempPathFactory) -> TinyAdapter:
    """Write an adapter of a task over a tiny base, once a session: tiny_adapter("causal", CARDS, seed=1). Do not change it."""

    @cache
    def slots_of(kind: str) -> tuple[FrozenBase, AdapterSlots]:
        base = fresh_base(kind)
        return base, AdapterSlots(base.model, match_modules(base.model, "all-linear"), 1, 16)

    @cache
    def write(kind: str, task: TinyTask, seed: int = 0) -> AdapterArtifact:
        base, slots = slots_of(kind)
        # Strong enough to turn answers around.
        tensors = {name: (a_RI, 4 * b_OR) for name, (a_RI, b_OR) in random_adapter(slots, task.rank, seed).items()}
        with torch.no_grad():
            return write_tiny_adapter(tmp_path_factory.mktemp(task.name) / "adapter", base, slots, tensors, task)

    return write


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """An MLflow registry on sqlite, shared by the session because setting it up takes seconds.

    Use task names of your own and leave no champions behind.
    """
    # MLflow takes seconds to import; only tests that ask for it pay.
    from multilora.registry import Registry

    folder = tmp_path_factory.mktemp("registry")
    registry = Registry(f"sqlite:///{folder / 'mlflow.db'}", folder / "artifacts")
    registry.initialise()
    return registry
