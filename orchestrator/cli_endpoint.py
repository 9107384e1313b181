"""The commands around the running endpoint: serve, query, ui, export-vllm, stop. Heavy imports sit inside them."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from multilora.errors import CapacityError
from orchestrator.cli_options import Json, Workspace, config_of, errors, print_json

endpoint_app = typer.Typer(rich_markup_mode="rich")
NUM_INPUTS_PER_REQUEST = 64
Port = Annotated[int, typer.Option("--port", min=1, max=65535)]
Foreground = Annotated[bool, typer.Option("--foreground", help="Stay in this terminal instead of returning when ready.")]


@endpoint_app.command(epilog="Example: orchestrator serve --port 8000")
def serve(
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; another than this machine's wants API keys.")
    ] = "127.0.0.1",
    port: Port = 8000,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Copies of the server, each with its own base.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option("--max-replicas", min=1, help="Let their number grow up to this one while requests queue up.")
    ] = None,
    target_requests: Annotated[
        int, typer.Option("--target-requests", min=1, help="Requests at once that one replica is meant for, of --max-replicas.")
    ] = 64,
    upscale_delay: Annotated[
        float, typer.Option("--upscale-delay", min=0, help="Seconds of more requests than that before a replica is added.")
    ] = 30.0,
    downscale_delay: Annotated[
        float, typer.Option("--downscale-delay", min=0, help="Seconds of fewer requests before a replica goes.")
    ] = 600.0,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Adapters on the device at once, per base.")] = 16,
    host_adapters: Annotated[int, typer.Option("--host-adapters", min=1, help="Adapters in host memory at once.")] = 256,
    by_task: Annotated[
        bool, typer.Option("--by-task", help="Send a task's requests to the same replica (header x-adapter-task): many tasks.")
    ] = False,
    challenger: Annotated[
        list[str] | None,
        typer.Option(
            "--challenger",
            metavar="TASK=5%|shadow",
            help="Let the task's challenger answer this share of its requests, or all of them in shadow; may be given often.",
        ),
    ] = None,
    foreground: Foreground = False,
    workspace: Workspace = None,
) -> None:
    """Start the endpoint that answers for every task's champion, and return when it is ready.

    What champions and challengers answered: orchestrator live
    """
    config, roles = config_of(workspace), _roles(challenger or [])
    num_replicas = (replicas, max_replicas or replicas)
    with errors():
        if num_replicas[1] < num_replicas[0]:
            raise typer.BadParameter(f"--max-replicas {max_replicas} is below --replicas {replicas}")
        if foreground:
            from orchestrator.ingress import haproxy_in_front

            with haproxy_in_front(config.ray_address, is_by_task=by_task):  # before Ray is imported
                from orchestrator.deploy import run_endpoint

                settings = {
                    "num_slots": slots,
                    "num_host_adapters": host_adapters,
                    "challengers": roles,
                    "target_requests_per_replica": target_requests,
                    "upscale_delay_s": upscale_delay,
                    "downscale_delay_s": downscale_delay,
                }
                run_endpoint(config, host, port, num_replicas, settings)
            return
        from orchestrator import background
        from orchestrator.services import start_endpoint
        from serve.auth import read_keys

        if roles and (running := background.find(config.serve_file)):
            raise CapacityError(f"an endpoint runs at {running.url}, with its own challengers; end it first: orchestrator stop")
        options: list[object] = ["--replicas", replicas, "--slots", slots, "--host-adapters", host_adapters]
        options += ["--max-replicas", max_replicas] if max_replicas else []
        options += ["--target-requests", target_requests, "--upscale-delay", upscale_delay, "--downscale-delay", downscale_delay]
        options += ["--by-task"] if by_task else []
        options += [word for one in challenger or () for word in ("--challenger", one)]
        url = start_endpoint(config, host, port, options)
        header = " -H 'Authorization: Bearer ak-...'" if read_keys(config.keys_file) else ""
    print(f"serving at {url}  (try: curl{header} {url}/v1/models ; log: {config.serve_file.with_suffix('.log')})")


def _roles(given: list[str]) -> dict[str, float | str]:
    """What the challenger of each task does: a share of its requests, or `shadow`."""
    roles: dict[str, float | str] = {}
    for text in given:
        match = re.fullmatch(r"([a-z0-9-]{1,63})=(?:(shadow)|([0-9]+(?:\.[0-9]+)?)%)", text, re.ASCII)
        role = match and (match[2] or float(match[3]) / 100)
        if not match or not role or (isinstance(role, float) and role >= 1):
            raise typer.BadParameter(f"--challenger {text}: give TASK=5% (more than 0 %, less than 100 %) or TASK=shadow")
        if match[1] in roles:
            raise typer.BadParameter(f"--challenger {text}: {match[1]} is given twice")
        roles[match[1]] = role
    return roles


@endpoint_app.command(epilog='Example: orchestrator query client-talk "I have been thinking about cutting down."')
def query(
    task: Annotated[str, typer.Argument(help="Task name.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; or give a file.")] = None,
    file: Annotated[typer.FileText | None, typer.Option("--file", "-f", help="One text per line; - for stdin.")] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Leave out the end of a text that is too long.")] = False,
    as_json: Json = False,
    url: Annotated[str | None, typer.Option("--url", help="Endpoint; default: the one this workspace started.")] = None,
    workspace: Workspace = None,
) -> None:
    """Ask the running endpoint for a task's answer to each text; with --json one object per text and line.

    Where the endpoint asks for an API key: export ORCHESTRATOR_API_KEY=ak-...
    """
    from orchestrator import services

    if bool(texts) == bool(file):
        raise typer.BadParameter("give texts, or a file with one text per line: --file")
    lines = (line.rstrip("\n") for line in file) if file else iter(texts or ())
    asked = (line for line in lines if line.strip())
    config = config_of(workspace)
    while some := list(islice(asked, NUM_INPUTS_PER_REQUEST)):
        with errors():
            answer = services.query(task, some, config, url, truncate=truncate)
        known = {name: answer[name] for name in ("model", "version", "digest")}
        for text, result in zip(some, answer["results"], strict=True):
            # A result of `auto` names the task that answered, its version and digest.
            found = {**known, **result}
            if as_json:
                print(json.dumps({"input": text, **found}, ensure_ascii=False), flush=True)
            else:
                print(_line(text, result, f"{found.get('task', task)}@{found['version']}"), flush=True)


def _line(text: str, result: dict[str, Any], version: str) -> str:
    if "text" in result:
        return f"{result['text']}\t({version})\t{text}"
    ranked = sorted(result["probabilities"].items(), key=lambda pair: -pair[1])
    shown = ", ".join(f"{label} {probability:.2f}" for label, probability in ranked[:3])
    return f"{result['label']}\t({shown}; {version})\t{text}"


@endpoint_app.command(epilog="Example: orchestrator ui --port 5000")
def ui(port: Port = 5000, workspace: Workspace = None) -> None:
    """Start the MLflow registry of this workspace as a web page on this machine, and return when it is ready."""
    from orchestrator.services import start_ui

    with errors():
        url = start_ui(config_of(workspace), port)
    print(f"MLflow at {url}  (registered adapters: {url}/#/models)")


@endpoint_app.command("export-vllm", epilog="Example: orchestrator export-vllm out --lora-path s3://bucket/loras")
def export_vllm(
    folder: Annotated[Path, typer.Argument(help="Empty folder for adapters and settings.")],
    lora_path: Annotated[str, typer.Option("--lora-path", help="Where the adapters will lie: s3://, gs://, abfss://, azure://.")],
    base: Annotated[str | None, typer.Option("--base", help="Base model, where champions are over several.")] = None,
    accelerator: Annotated[str | None, typer.Option("--accelerator", help="Kind of GPU, such as L4.")] = None,
    as_json: Json = False,
    workspace: Workspace = None,
) -> None:
    """Write the champions over one causal base as Ray Serve LLM and vLLM read them; see docs/vllm.md."""
    from multilora.registry import Registry
    from serve.vllm_backend import CLOUDS, export_champions

    if not lora_path.startswith(CLOUDS):
        raise typer.BadParameter(f"Ray loads adapters from {', '.join(CLOUDS)} alone", param_hint="--lora-path")
    config = config_of(workspace)
    with errors():
        registry = Registry(config.registry_uri, config.artifact_root)
        done = export_champions(registry, config.downloads_dir, folder, lora_path, base, accelerator)
    if as_json:
        print_json({**asdict(done), "config": done.config.model_dump(exclude_none=True)})
        return
    for task, reason in done.left_out.items():
        print(f"left out: {task} {reason}")
    print(f"{', '.join(done.adapters.values())} -> {folder / 'adapters'}; copy it to {lora_path}, then on a machine with a GPU:")
    print(f"pip install 'adapter-orchestrator[vllm]' && serve run {folder / 'serve.yaml'}")


@endpoint_app.command(epilog="Example: orchestrator stop")
def stop(workspace: Workspace = None) -> None:
    """End the endpoint and the MLflow page that this workspace started."""
    from orchestrator import background

    config = config_of(workspace)
    for name, state_file in (("endpoint", config.serve_file), ("MLflow page", config.ui_file)):
        print(f"{name}: {'stopped' if background.stop(state_file) else 'was not running'}")
