"""The command that writes an adapter version for elsewhere: export. Heavy imports sit inside it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from orchestrator.cli_options import Json, Workspace, config_of, errors, print_json

export_app = typer.Typer(rich_markup_mode="rich")


@export_app.command(epilog="Example: orchestrator export client-talk --merged --out client-talk-merged")
def export(
    task: Annotated[str, typer.Argument(help="Task name.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; not there yet, or empty.")],
    version: Annotated[int | None, typer.Option("--version", min=1, help="Version; default the champion.")] = None,
    merged: Annotated[
        bool, typer.Option("--merged/--adapter", help="The base with the adapter merged in, or the adapter alone.")
    ] = False,
    form: Annotated[
        Literal["peft", "vllm"], typer.Option("--format", help="Of the adapter: PEFT's, or with the request that vLLM takes.")
    ] = "peft",
    as_json: Json = False,
    workspace: Workspace = None,
) -> None:
    """Write an adapter version as a folder that plain PEFT, transformers or vLLM loads; its README.md tells how.

    All champions over one base for Ray Serve LLM: orchestrator export-vllm
    """
    from orchestrator.export import export as export_version

    if merged and form == "vllm":
        raise typer.BadParameter("vLLM loads a merged folder as it is; leave out --format", param_hint="--format")
    config = config_of(workspace)
    with errors():
        done = export_version(config, task, version, "merged" if merged else "vllm" if form == "vllm" else "adapter", out)
    if as_json:
        print_json(asdict(done))
    else:
        print(f"{done.version} -> {out}: {', '.join(done.files)} ({done.num_bytes / 2**20:.1f} MiB)")
