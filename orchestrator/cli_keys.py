"""The commands around API keys: create, list, revoke. Light: no torch, no Ray."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli_options import Json, Workspace, config_of, errors, print_json

if TYPE_CHECKING:
    from serve.auth import ApiKey

keys_app = typer.Typer(rich_markup_mode="rich", no_args_is_help=True, help="API keys of the endpoint: who may ask which tasks.")


@keys_app.command(epilog="Example: orchestrator key create billing-team --tasks support-intent,message-urgency --rate 600")
def create(
    name: Annotated[str, typer.Argument(help="Who gets it.")],
    tasks: Annotated[str, typer.Option("--tasks", help="Task names with commas between; * for all.")],
    rate: Annotated[
        int | None, typer.Option("--rate", min=1, help="Most inputs a minute, on each replica; default no limit.")
    ] = None,
    as_json: Json = False,
    workspace: Workspace = None,
) -> None:
    """Create a key and show it, once: only its hash is kept. From the first one on, `serve` asks every request for a key."""
    from serve.auth import create_key, read_keys

    file = config_of(workspace).keys_file
    wanted = [task.strip() for task in tasks.split(",") if task.strip()]
    if not wanted:
        raise typer.BadParameter("name at least one task, or * for all")
    with errors():
        is_first = not read_keys(file)
        key, secret = create_key(file, name, wanted, rate, datetime.now(UTC).isoformat(timespec="seconds"))
    if as_json:
        print_json({**_shown(key), "key": secret})
        return
    print(secret)
    print(f"Send it as: Authorization: Bearer {secret[:12]}...   (for `query`: export ORCHESTRATOR_API_KEY={secret[:12]}...)")
    if is_first:
        print("It is the first key: an endpoint that runs asks for keys once it was stopped and served again.")


@keys_app.command("list", epilog="Example: orchestrator key list --json")
def list_keys(as_json: Json = False, workspace: Workspace = None) -> None:
    """Show every key's id, name, tasks and limit; nobody can show the keys themselves."""
    from orchestrator import tables
    from serve.auth import read_keys

    with errors():
        keys = read_keys(config_of(workspace).keys_file)
    if as_json:
        print_json({"keys": [_shown(key) for key in keys]})
        return
    table = tables.table_of("id", "name", "tasks", "inputs a minute", "created")
    for key in keys:
        limit = "no limit" if key.max_inputs_per_minute is None else str(key.max_inputs_per_minute)
        table.add_row(key.id, key.name, ", ".join(key.tasks), limit, key.created)
    tables.print_rich(table)


@keys_app.command(epilog="Example: orchestrator key revoke 1f0c22ab")
def revoke(
    key_id: Annotated[str, typer.Argument(help="Its id, see: orchestrator key list.", metavar="ID")],
    as_json: Json = False,
    workspace: Workspace = None,
) -> None:
    """Take a key away; running endpoints refuse it from the next request on."""
    from serve.auth import revoke_key

    with errors():
        key = revoke_key(config_of(workspace).keys_file, key_id)
    if as_json:
        print_json({"revoked": _shown(key)})
    else:
        print(f"revoked {key.id} ({key.name})")


def _shown(key: ApiKey) -> dict[str, Any]:
    return {name: value for name, value in asdict(key).items() if name != "sha256"}
