"""Champions for vLLM: Ray's own classes take the settings, plain PEFT takes the adapters, and the request asks what we ask."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from pydantic import ValidationError
from tiny_adapters import CARDS, MAIL, MOOD, SHORTEN, TEXTS, item_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import serve.pyfunc_model as pyfunc_model
from multilora.errors import RequestError
from multilora.registry import CHAMPION
from multilora.spec import BaseSpec
from orchestrator.cli import app as command_line
from serve.engine import Engine, Work
from serve.vllm_backend import RANKS, LlmConfig, export_adapter, export_champions, llm_config, request_of, serve_yaml

QWEN = BaseSpec(model="Qwen/Qwen2.5-7B-Instruct", revision="main", dtype="bfloat16")
PATH = "s3://bucket/loras"


def rays_config():
    """Ray's class, which open-source Ray carries but exports with vLLM alone."""
    return pytest.importorskip("ray.llm._internal.serve.core.configs.llm_config", reason="this Ray has no ray.llm").LLMConfig


@pytest.mark.parametrize(("ranks", "allowed"), [([1], 1), ([2, 8], 8), ([9], 16), ([4, 64, 16], 64), ([129], 256), ([257], 320)])
def test_ray_takes_the_settings(ranks, allowed):
    config = llm_config(QWEN, ranks, f"{PATH}/", "L4")
    found = rays_config()(**yaml.safe_load(serve_yaml(config))["applications"][0]["args"]["llm_configs"][0])
    assert found.model_loading_config.model_id == found.model_loading_config.model_source == QWEN.model
    assert found.lora_config.dynamic_lora_loading_path == PATH
    assert found.lora_config.max_num_adapters_per_replica == found.engine_kwargs["max_loras"] == len(ranks)
    assert found.engine_kwargs["enable_lora"] is True
    assert (found.engine_kwargs["max_lora_rank"], found.engine_kwargs["revision"]) == (allowed, "main")
    assert found.accelerator_type == "L4"
    assert allowed in RANKS


def test_what_ray_would_refuse_is_refused_here():
    good = llm_config(QWEN, [8], PATH).model_dump()
    for part, name, value in (
        ("lora_config", "dynamic_lora_loading_path", "/mnt/shared/loras"),
        ("engine_kwargs", "max_lora_rank", 12),
        ("engine_kwargs", "gpu_memory", 0.9),
        ("model_loading_config", "model_id", "qwen:cards"),
    ):
        with pytest.raises(ValidationError):
            LlmConfig.model_validate({**good, part: {**good[part], name: value}})
    with pytest.raises(ValueError, match="Invalid lora_config"):
        rays_config()(**{**good, "lora_config": {**good["lora_config"], "dynamic_lora_loading_path": "/mnt/shared/loras"}})


@pytest.mark.parametrize("task", [CARDS, MAIL])
def test_plain_peft_scores_the_choices_as_the_engine_does(tmp_path, fresh_base, base_folder, tiny_adapter, task):
    artifact = tiny_adapter("causal", task)
    export_adapter(artifact, 3, tmp_path / task.name)
    asked = json.loads((tmp_path / task.name / "request.json").read_text(encoding="utf-8"))
    assert (asked["version"], asked["digest"]) == (3, artifact.digest)
    engine = Engine(fresh_base("causal"), num_slots=1, max_rank=8)
    key = engine.bind(artifact, 3)
    plain = AutoModelForCausalLM.from_pretrained(base_folder("causal"))
    model = PeftModel.from_pretrained(plain, tmp_path / task.name).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_folder("causal"))
    for text in TEXTS[:3]:
        item = item_of(task, text)
        prompt = asked["prompt"]
        for name in asked["columns"]:
            prompt = prompt.replace(f"{{{name}}}", item[name])
        (answer,) = engine.classify([Work(key, engine.prompt(key, item))])
        scores = []
        for choice in asked["body"]["structured_outputs"]["choice"]:
            given = tokenizer(prompt)["input_ids"]
            said = [*tokenizer(choice, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            assert len(said) <= asked["body"]["max_tokens"]
            with torch.no_grad():
                logits_TV = model(torch.tensor([given + said])).logits[0].float().log_softmax(-1)
            scores.append(sum(logits_TV[len(given) - 1 + at, token].item() for at, token in enumerate(said)))
        assert scores == pytest.approx(answer.scores, abs=1e-3)


def test_a_request_names_base_and_task(tiny_adapter):
    labels = request_of(tiny_adapter("causal", CARDS).card, 1, "d")["body"]
    assert labels["model"] == "causal:cards"
    assert labels["structured_outputs"] == {"choice": [" card lost", " card late", " rate"]}
    text = request_of(tiny_adapter("causal", SHORTEN).card, 1, "d")["body"]
    assert (text["max_tokens"], "structured_outputs" in text) == (6, False)


@pytest.fixture
def champions(registry, tiny_adapter):
    """Two tasks over a causal base and one over an encoder, champions until the test ends."""
    made = (("causal", CARDS), ("causal", SHORTEN), ("encoder", MOOD))
    for kind, task in made:
        artifact = tiny_adapter(kind, task)
        run = registry.start_run(task.name, artifact.digest[:16], {}, {})
        version = registry.register(run, artifact.folder, artifact.digest, pyfunc_model.__file__, "", {})
        registry.set_alias(version, CHAMPION)
    yield
    for _, task in made:
        registry.drop_alias(task.name, CHAMPION)


def test_the_champions_over_one_base_are_exported(registry, champions, tmp_path, base_folder, monkeypatch):
    done = export_champions(registry, tmp_path / "downloads", tmp_path / "out", PATH)
    assert sorted(done.adapters) == ["cards", "shorten"]
    assert done.left_out == {"mood": "is over a base of family encoder, which vLLM serves without adapters or not at all"}
    assert sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()) == [
        *(f"adapters/{task}/{name}" for task in ("cards", "shorten")
          for name in ("adapter_config.json", "adapter_model.safetensors", "request.json")),
        "serve.yaml",
    ]  # fmt: skip
    settings = yaml.safe_load((tmp_path / "out" / "serve.yaml").read_text(encoding="utf-8"))["applications"][0]
    assert settings["import_path"] == "ray.serve.llm:build_openai_app"
    assert settings["args"]["llm_configs"][0]["model_loading_config"]["model_source"] == str(base_folder("causal"))
    with pytest.raises(RequestError, match="is not empty"):
        export_champions(registry, tmp_path / "downloads", tmp_path / "out", PATH)
    with pytest.raises(RequestError, match="no champion is over such a causal base: cards is over"):
        export_champions(registry, tmp_path / "downloads", tmp_path / "other", PATH, base="Qwen/Qwen3-8B")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.tracking_uri)
    words = ["export-vllm", str(tmp_path / "cli"), "--lora-path", PATH, "--json", "--workspace", str(tmp_path / "ws")]
    shown = json.loads(CliRunner().invoke(command_line, words).stdout)
    assert sorted(shown["adapters"]) == ["cards", "shorten"]
    refused = CliRunner().invoke(command_line, ["export-vllm", str(tmp_path / "cli2"), "--lora-path", "/mnt/loras"])
    assert refused.exit_code == 2
