"""An exported folder gives the engine's scores in plain PEFT and plain transformers, also by the code of its README.

float32 results of differently shaped products may differ by 1e-5 of the largest, which the log-likelihoods here make 1e-3.
"""

import ast
import json
import re
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from plain_peft import AUTO_CLASS, plain_probabilities
from tiny_adapters import CARDS, MAIL, SHORTEN, TEXTS, item_of, write_tiny_adapter
from transformers import AutoTokenizer
from typer.testing import CliRunner

import serve.pyfunc_model as pyfunc_model
from multilora.artifact import read_tensors, write_artifact
from multilora.base_files import find_base
from multilora.errors import AdapterError, RequestError, UnknownTaskError
from multilora.lora import AdapterSlots
from multilora.registry import CHAMPION
from multilora.spec import BaseSpec
from multilora.target_modules import match_modules
from orchestrator.cli import app
from orchestrator.config import OrchestratorConfig
from orchestrator.export import export, write_merged
from orchestrator.export_readme import code_of, readme_of
from orchestrator.files import whole_folder
from serve.engine import Engine, Work
from serve.vllm_backend import export_adapter

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
ASKED = [text for text in TEXTS if text][:4]


@pytest.fixture
def champion(registry, tiny_adapter):
    """Register an adapter of a task and make it champion until the test ends: champion(kind, task) -> (artifact, version)."""
    made = []

    def register(kind, task, **tags):
        named = replace(task, name=f"export-{task.name}-{kind}")
        artifact = tiny_adapter(kind, named)
        run = registry.start_run(named.name, artifact.digest[:16], {}, {})
        version = registry.register(run, artifact.folder, artifact.digest, pyfunc_model.__file__, "", tags)
        registry.set_alias(version, CHAMPION)
        made.append(named.name)
        return artifact, version

    yield register
    for name in made:
        registry.drop_alias(name, CHAMPION)


@pytest.fixture
def config(registry, tmp_path):
    return OrchestratorConfig(workspace=tmp_path / "workspace", tracking_uri=registry.tracking_uri)


def engine_answers(base, artifact, task):
    engine = Engine(base, 1, 8)
    key = engine.bind(artifact, 1)
    return engine.classify([Work(key, engine.prompt(key, item_of(task, text))) for text in ASKED])


def names_of(readme, folder, base):
    """Run the Python of a README, as somebody would who has the base elsewhere."""
    code = readme.partition("```python\n")[2].partition("```")[0]
    assert 'FOLDER = "."' in code
    code = re.sub('^FOLDER = ".*"', f"FOLDER = {str(folder)!r}", code, flags=re.MULTILINE)
    code = re.sub("^BASE = '.*'", f"BASE = {str(base)!r}", code, flags=re.MULTILINE)
    names = {}
    exec(code, names)
    return names


@pytest.mark.parametrize(
    ("kind", "task"),
    [(kind, CARDS) for kind in ("encoder", "seq2seq", "causal")]
    + [(kind, MAIL) for kind in ("encoder", "roberta", "seq2seq", "bart", "causal", "gpt2", "qwen2")],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
@pytest.mark.parametrize("how", ["adapter", "merged"])
def test_plain_libraries_and_the_readme_give_the_scores_of_the_engine(
    champion, config, fresh_base, base_folder, tmp_path, how, kind, task
):
    artifact, version = champion(kind, task)
    done = export(config, version.task, None, how, tmp_path / "out")
    assert (done.version, done.digest, done.kind) == (version.key, artifact.digest, how)
    base = fresh_base(kind)
    expected = engine_answers(fresh_base(kind), artifact, task)
    if how == "adapter":
        assert set(done.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        plain = AUTO_CLASS[base.family].from_pretrained(base_folder(kind))
        model = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    else:
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(done.files)
        assert len({(tmp_path / "out" / name).stat().st_mode for name in done.files}) == 1
        model = AUTO_CLASS[base.family].from_pretrained(tmp_path / "out").eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert all(tokenizer(text)["input_ids"] == base.tokenizer(text)["input_ids"] for text in TEXTS)
    names = names_of((tmp_path / "out" / "README.md").read_text(encoding="utf-8"), tmp_path / "out", base_folder(kind))
    for text, answer in zip(ASKED, expected, strict=True):
        item = item_of(task, text)
        largest = max(map(abs, answer.scores))
        assert names["scores"](item).tolist() == pytest.approx(answer.scores, abs=TOLERANCE * largest)
        assert names["probabilities"](item) == pytest.approx(
            dict(zip(answer.labels, answer.probabilities, strict=True)), abs=TOLERANCE
        )
        if kind != "bart":  # its answers begin with <s>, which the oracle leaves out
            plain = plain_probabilities(base, model, task, text, task.temperature)
            assert plain == pytest.approx(answer.probabilities, abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["seq2seq", "causal", "gpt2"])
@pytest.mark.parametrize("how", ["adapter", "merged"])
def test_free_texts_are_written_as_the_engine_writes_them(champion, config, fresh_base, base_folder, tmp_path, how, kind):
    artifact, version = champion(kind, SHORTEN)
    export(config, version.task, None, how, tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    names = names_of(readme, tmp_path / "out", base_folder(kind))
    expected = [answer.label for answer in engine_answers(fresh_base(kind), artifact, SHORTEN)]
    assert [names["write"](item_of(SHORTEN, text)) for text in ASKED] == expected
    assert "## Labels" not in readme


def test_a_merged_encoder_carries_what_the_base_makes_of_the_labels(champion, config, fresh_base, tmp_path):
    _, version = champion("encoder", CARDS)
    export(config, version.task, None, "merged", tmp_path / "out")
    vectors_LH = np.load(tmp_path / "out" / "label_vectors.npy")
    base = fresh_base("encoder")
    for vector_H, wording in zip(vectors_LH, ("card lost: the card is gone", "card late"), strict=False):
        with torch.no_grad():
            expected_H = base.model(**base.tokenizer(wording, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert vector_H == pytest.approx((expected_H / expected_H.norm()).numpy(), abs=1e-5)
    assert vectors_LH.shape == (3, base.files.hidden_size)


def test_bfloat16_stays_bfloat16(fresh_base, random_adapter, tmp_path):
    base = fresh_base("causal", dtype="bfloat16")
    slots = AdapterSlots(base.model, match_modules(base.model, "all-linear"), 1, 16)
    with torch.no_grad():
        artifact = write_tiny_adapter(tmp_path / "adapter", base, slots, random_adapter(slots, CARDS.rank, 1), CARDS)
    write_merged("cards@1", artifact, tmp_path / "out")
    model = AUTO_CLASS["causal"].from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_readme_says_what_it_is(champion, config, tmp_path):
    tags = {"accuracy": "0.8125", "num_gate_examples": "96", "verdict": "NON_INFERIOR", "gate": '{"metric": "accuracy"}'}
    artifact, version = champion("encoder", CARDS, **tags)
    export(config, version.task, version.version, "adapter", tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for text in (
        f"# {version.key}",
        f"* version: {version.key}, digest {artifact.digest[:12]}",
        "* base: encoder, float32",  # its folder is this machine's alone
        "* gate: accuracy 0.812 on 96 gate examples, verdict NON_INFERIOR",
        "## Prompt\n\n    {text}\n",
        "* `card lost`: the card is gone",
        "* `card late`\n",
        "20 x the cosine of two vectors",
    ):
        assert text in readme
    assert str(tmp_path) not in readme
    assert "* gate: never judged" in readme_of(artifact.card, version.key, artifact.digest, "adapter", "")


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("family", ["encoder", "seq2seq", "causal"])
@pytest.mark.parametrize("how", ["adapter", "merged", "vllm"])
def test_the_code_compiles_whatever_the_task_is_called(tiny_adapter, family, how, quantization):
    card = tiny_adapter(family, MAIL).card.model_copy(
        update={
            "base": BaseSpec(model="a/b", revision="main", quantization=quantization),
            "instruction": 'Say "it"\n```\n{class} $1 {{x}} \\ {labels}\'\n',
            "text_column": "class",
            "labels": [("it's", 'a "quote"'), ("${x}", "two\nlines"), ("```", "long " * 60)],
        }
    )
    code = code_of(card, how)
    assert ("revision='main'" in code) == (how == "adapter")
    names = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(code).body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("LABELS", "INSTRUCTION")
    }
    if how != "vllm":
        assert names["LABELS"] == {"it's": 'it\'s: a "quote"', "${x}": "${x}: two\nlines", "```": "```: " + "long " * 60}
        assert names.get("INSTRUCTION", card.instruction) == card.instruction


def test_vllm_gets_the_request_too(champion, config, tmp_path):
    artifact, version = champion("causal", CARDS)
    done = export(config, version.task, None, "vllm", tmp_path / "out")
    export_adapter(artifact, version.version, tmp_path / "same")
    for name in ("adapter_config.json", "adapter_model.safetensors", "request.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    assert set(done.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "request.json"}
    _, encoder = champion("encoder", CARDS)
    with pytest.raises(RequestError, match=r"is over a base of family encoder, which vLLM .*; leave out --format vllm"):
        export(config, encoder.task, None, "vllm", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def changed(artifact, folder, **updates):
    return write_artifact(folder, artifact.card.model_copy(update=updates), read_tensors(artifact))


def test_what_cannot_be_merged_is_refused(tiny_adapter, tmp_path):
    artifact = tiny_adapter("encoder", CARDS)
    quantised = changed(artifact, tmp_path / "8bit", base=artifact.card.base.model_copy(update={"quantization": "8bit"}))
    with pytest.raises(RequestError, match=r"cards@1 is over a base in 8bit, .* export it alone: --adapter"):
        write_merged("cards@1", quantised, tmp_path / "out")
    other = changed(artifact, tmp_path / "other", base_fingerprint="f" * 64)
    with pytest.raises(AdapterError, match=r"cards@1 belongs to base .* with fingerprint ffffffffffff; this machine's has"):
        write_merged("cards@1", other, tmp_path / "out")
    canary = artifact.card.canaries[0]
    wrong = canary.model_copy(update={"scores": [score + 1 for score in canary.scores]})
    lying = changed(artifact, tmp_path / "lying", canaries=[wrong, *artifact.card.canaries[1:]])
    with pytest.raises(AdapterError, match="cards@1: canary scores differ by 1 from those after training"):
        write_merged("cards@1", lying, tmp_path / "out")


def test_which_version(champion, config, registry, tmp_path):
    _, version = champion("encoder", CARDS)
    with pytest.raises(RequestError, match=f"{version.task} has no version 99; its versions: "):
        export(config, version.task, 99, "adapter", tmp_path / "out")
    with pytest.raises(RequestError, match="auto is the router, which has no adapter"):
        export(config, "auto", None, "adapter", tmp_path / "out")
    with pytest.raises(UnknownTaskError, match="nobody has no champion; see: orchestrator status"):
        export(config, "nobody", None, "adapter", tmp_path / "out")
    registry.drop_alias(version.task, CHAMPION)
    with pytest.raises(UnknownTaskError, match=f"{version.task} has no champion; choose one of its versions: --version "):
        export(config, version.task, None, "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(config, version.task, version.version, "adapter", tmp_path / "out").version == version.key


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as staging:
        staging.mkdir()
        (staging / "file").write_text("x", encoding="utf-8")
        assert not any((tmp_path / "empty").iterdir())
    assert (tmp_path / "empty" / "file").is_file()
    (tmp_path / "a-file").touch()
    for taken in ("empty", "a-file"):
        with pytest.raises(RequestError, match="is there already and not an empty folder"), whole_folder(tmp_path / taken):
            pass
    with suppress(KeyError), whole_folder(tmp_path / "deep" / "new") as staging:
        staging.mkdir()
        raise KeyError
    assert list((tmp_path / "deep").iterdir()) == []


def test_the_command(champion, config, base_folder, tmp_path, monkeypatch):
    artifact, version = champion("encoder", CARDS)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", config.tracking_uri)

    def orchestrator(*words):
        return CliRunner().invoke(app, ["export", version.task, *words, "--workspace", str(config.workspace)])

    shown = orchestrator("--out", str(tmp_path / "out"), "--merged", "--json")
    found = json.loads(shown.stdout)
    assert (found["version"], found["kind"], found["digest"]) == (version.key, "merged", artifact.digest)
    assert found["num_bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert (
        find_base(BaseSpec(model=str(tmp_path / "out"))).num_parameters
        == find_base(BaseSpec(model=str(base_folder("encoder")))).num_parameters
    )
    again = orchestrator("--out", str(tmp_path / "out"))
    assert (again.exit_code, "is there already" in again.output) == (1, True)
    done = orchestrator("--out", str(tmp_path / "adapter"))
    assert f"{version.key} -> {tmp_path / 'adapter'}: README.md, adapter_config.json, adapter_model" in done.output
    assert orchestrator("--out", str(tmp_path / "x"), "--merged", "--format", "vllm").exit_code == 2
    assert orchestrator("--out", str(tmp_path / "x"), "--format", "gguf").exit_code == 2
