"""The floors: a module imports only project modules that stand below it; what must load fast loads no torch, ray or mlflow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {  # lowest first; a new module gets its place here
    "multilora": "errors log segments yaml_loader spec spec_hash spec_files prompt base_files base_layers base_model "
    "target_modules routing lora recorded artifact fingerprint answer_tree scoring generate task_router mlflow_errors registry",
    "serve": "config schema router error_table auth guard live_counts slots batcher writer canaries answer "
    "forward_threads engine pyfunc_model pyfunc_router metrics base_server adapter_store auto challenger "
    "replica models_api openai_schema openai_ask openai_api web_page app vllm_backend",
    "orchestrator": "config files metrics calibration batching schedule power dataset plain_baselines demonstrations gates "
    "cluster_size room plan search prepare state paired methods learning_curve eval_report comparison judge "
    "history group_task pace adapter_run search_run ranks group_batch gradient_checkpointing frozen_prefix "
    "micro_batches base_alone baselines prototypes prompting trainer worker train_together variants curve_rows "
    "cross rungs contamination choose_columns inspect_data token_lengths first_spec evaluate cross_evaluate "
    "plain_scoring plain_heads plain_training plain_methods own_adapters alone merged_or_not ladder "
    "report_words live report_text report_page report_sentence report_parts report_history report submissions "
    "turns session entry cluster background launch jobs ingress services work search_record status deploy "
    "mailbox controller curves training evaluation release export_readme export aliases router_fit "
    "task_routing driver evidence doctor api progress tables compare_result compare_store compare_advice "
    "compare_plots compare_table compare_page compare_worker compare batch_files batch cli_options cli_submit "
    "cli_batch cli_endpoint cli_aliases cli_evidence cli_compare cli_init cli_export cli_keys cli_router cli "
    "__main__",
}
MODULES = {f"{package}.{name}": ROOT / package / f"{name}.py" for package, names in FLOORS.items() for name in names.split()}
FROM_SERVE = {
    "orchestrator.deploy": ("serve.app", "serve.auth", "serve.config"),
    "orchestrator.services": ("serve.auth",),
    "orchestrator.export": ("serve.canaries", "serve.vllm_backend"),
    "orchestrator.live": ("serve.live_counts",),
    "orchestrator.base_alone": ("serve.forward_threads",),
    "orchestrator.cli_keys": ("serve.auth",),
    "orchestrator.cli_endpoint": ("serve.auth", "serve.vllm_backend"),
    **{
        f"orchestrator.{name}": ("serve.answer", "serve.engine")
        for name in ("batch", "evaluate", "cross_evaluate", "ladder", "router_fit", "task_routing", "train_together")
    },
    **{f"orchestrator.{name}": ("serve.engine",) for name in ("own_adapters", "alone", "merged_or_not")},
}
LIGHT = """serve.auth serve.guard orchestrator.gates orchestrator.cross orchestrator.rungs multilora.errors
    multilora.log multilora.spec multilora.spec_files multilora.prompt multilora.segments multilora.base_files
    serve.config serve.live_counts serve.schema serve.openai_schema serve.router serve.slots serve.batcher orchestrator.config
    orchestrator.dataset orchestrator.choose_columns orchestrator.inspect_data orchestrator.export_readme
    orchestrator.dataset orchestrator.plain_baselines orchestrator.demonstrations
    orchestrator.cluster_size orchestrator.plan orchestrator.group_task orchestrator.eval_report orchestrator.prepare
    orchestrator.report_words orchestrator.live orchestrator.report_text orchestrator.report_page orchestrator.report
    orchestrator.services orchestrator.ingress orchestrator.state orchestrator.submissions orchestrator.comparison
    orchestrator.judge
    orchestrator.methods orchestrator.learning_curve orchestrator.power orchestrator.paired orchestrator.history
    orchestrator.metrics orchestrator.calibration
    orchestrator.batching orchestrator.schedule orchestrator.launch orchestrator.turns orchestrator.progress
    orchestrator.compare_result orchestrator.compare_store orchestrator.compare_advice orchestrator.compare_plots
    orchestrator.compare_table orchestrator.compare_page
    orchestrator.batch_files orchestrator.search orchestrator.tables orchestrator.cli"""


def imports_of(node, is_nested=False):
    """Yield (imported name, is inside a function); `from a import b` gives a and a.b. Skips `if TYPE_CHECKING`."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from ((alias.name, is_nested) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import in line {node.lineno}"
        yield from ((name, is_nested) for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    for child in ast.iter_child_nodes(node):
        yield from imports_of(child, is_nested or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def test_every_module_has_a_floor():
    files = {file for package in FLOORS for file in (ROOT / package).rglob("*.py") if file.name != "__init__.py"}
    assert files == set(MODULES.values())


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    imports = list(imports_of(ast.parse(MODULES[module].read_text(encoding="utf-8"))))
    imported = {name for name, _ in imports}
    above = list(MODULES)[list(MODULES).index(module) :]
    not_offered = [name for name in MODULES if name.startswith("serve.") and name not in FROM_SERVE.get(module, ())]
    assert not imported & {*above, *(not_offered if module.startswith("orchestrator.") else ())}
    knows_mlflow = any(name.partition(".")[0] == "mlflow" for name in imported)
    may_know_it = ("multilora.mlflow_errors", "multilora.registry", "serve.pyfunc_model", "serve.pyfunc_router")
    assert module in may_know_it or not knows_mlflow
    assert module.startswith("orchestrator.cli") or not [name for name, is_nested in imports if is_nested]


def test_light_modules_load_no_torch_ray_or_mlflow():
    code = f"import sys, {', '.join(LIGHT.split())}; print(*sorted({{'torch', 'ray', 'mlflow'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


@pytest.mark.parametrize("module", MODULES)
def test_a_file_past_350_lines_is_two_nouns(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 350


def test_the_file_tree_of_the_readme_is_true():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Files")[2].partition("\n## ")[0]
    named = {word for word in tree.split() if word.endswith(".py")}
    files = [*MODULES.values(), *(ROOT / "benchmarks").glob("[!_]*.py")]
    assert named == {file.name for file in files if file.name != "__main__.py"}
