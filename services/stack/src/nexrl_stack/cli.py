"""The ``nexrl`` command line: parse, call one function, show what it gives."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from nexrl_contract.names import valid_identifier
from nexrl_storage.manifest import published
from rich.console import Console, RenderableType

from nexrl_stack import gateway_api, views
from nexrl_stack.services import StackSettings, default_slots
from nexrl_stack.supervisor import GaveUp
from nexrl_stack.up import Refused, free_port, run_stack

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help=__doc__.splitlines()[0],
    pretty_exceptions_show_locals=False,
)

DataOption = Annotated[
    Path, typer.Option("--data", envvar="NEXRL_DATA", help="Data folder; checkpoints lie under it.")
]
RootsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--checkpoint-root",
        help="A further folder for checkpoints, repeatable. Default: the current folder.",
    ),
]
UrlOption = Annotated[
    str, typer.Option("--url", envvar="NEXRL_URL", help="Address of the gateway.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
_PIPE_COLUMNS = 200
DEFAULT_DATA = Path("data")
DEFAULT_URL = "http://127.0.0.1:8000"


@app.command()
def up(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 picks a free one.", min=0, max=65535)
    ] = 8000,
    slots: Annotated[
        int | None, typer.Option(help="Ranks at a time. Default: the CUDA devices, else 4.", min=1)
    ] = None,
    checkpointers: Annotated[int, typer.Option(help="How many checkpointers to run.", min=1)] = 1,
    redis: Annotated[
        str | None, typer.Option(help="URL of a Redis to use instead of the embedded server.")
    ] = None,
    data: DataOption = DEFAULT_DATA,
    checkpoint_root: RootsOption = None,
    model_root: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder that models are read from, repeatable. Default on loopback: any."
        ),
    ] = None,
    payloads: Annotated[
        str | None,
        typer.Option(help="Payload store, file://DIR or redis://URL. Default: under --data."),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Forget earlier groups, jobs and logs; checkpoints stay."),
    ] = False,
) -> None:
    """Run the whole service here until Ctrl-C; prints one line `nexrl ready URL`."""
    if fresh and redis is not None:
        _fail(
            "--fresh forgets what the embedded server holds; leave it out, and empty the Redis of "
            "--redis yourself"
        )
    try:
        settings = StackSettings(
            host=host,
            port=port or free_port(host),
            slots=slots or default_slots(),
            checkpointers=checkpointers,
            data=data.expanduser().resolve(),
            redis_url=redis,
            payloads=payloads,
            checkpoint_roots=_absolute(checkpoint_root) or (Path.cwd(),),
            model_roots=_absolute(model_root),
        )
        run_stack(
            settings, fresh=fresh, ready=lambda url: typer.echo(f"nexrl ready {url}"), say=_note
        )
    except (Refused, GaveUp) as error:
        _fail(str(error))


@app.command()
def status(url: UrlOption = DEFAULT_URL, as_json: JsonOption = False) -> None:
    """Groups, slots, agents, and whether Redis and the payload store answer."""
    found = _ask(gateway_api.fetch_status, url)
    _show(found, views.status_view(found), as_json)


@app.command()
def jobs(
    identifier: Annotated[str | None, typer.Option(help="Only the jobs of this group.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many, newest first.", min=1)] = 20,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Jobs: their state, why they wait or failed, and their times."""
    found = _ask(gateway_api.fetch_jobs, url, identifier, limit)
    _show({"jobs": found}, views.jobs_view(found), as_json)


@app.command()
def logs(
    identifier: Annotated[str, typer.Argument(help="The group.")],
    data: DataOption = DEFAULT_DATA,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep printing new lines until Ctrl-C.")
    ] = False,
) -> None:
    """The logs of a group's ranks, each line with its rank."""
    if not valid_identifier(identifier):
        _fail(f"{identifier!r} is no identifier of a group")
    folder = data.expanduser().resolve() / ".nexrl" / "logs" / "groups" / identifier
    if not follow and not views.rank_files(folder):
        _fail(
            f"there are no logs of a group {identifier!r} under {folder}; give the stack's folder "
            "with --data"
        )
    for line in views.rank_lines(folder, follow=follow):
        typer.echo(line)


@app.command()
def checkpoints(
    data: DataOption = DEFAULT_DATA,
    checkpoint_root: RootsOption = None,
    as_json: JsonOption = False,
) -> None:
    """The published checkpoints, oldest first."""
    found = published([data.expanduser().resolve(), *(_absolute(checkpoint_root) or (Path.cwd(),))])
    _show(
        {"checkpoints": [item.model_dump(mode="json") for item in found]},
        views.checkpoints_view(found),
        as_json,
    )


def _absolute(folders: list[Path] | None) -> tuple[Path, ...]:
    whole = tuple(folder.expanduser().resolve() for folder in folders or ())
    for folder in whole:
        if os.pathsep in str(folder):  # they travel in one variable
            _fail(f"{folder} cannot be a root: it holds {os.pathsep!r}")
    return whole


def _ask(fetch: Any, *arguments: Any) -> Any:
    try:
        return fetch(*arguments)
    except gateway_api.GatewayError as error:
        _fail(str(error))


def _show(value: dict[str, Any], view: RenderableType, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(value, indent=1))
    else:
        # In a file or a pipe there is no edge to wrap at.
        Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_COLUMNS).print(view)


def _note(message: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that was closed must not end what it started
        typer.echo(f"nexrl: {message}", err=True)


def _fail(message: str) -> NoReturn:
    _note(message)
    raise typer.Exit(1)
