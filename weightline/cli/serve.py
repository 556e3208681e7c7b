"""weightline serve vllm | transformers | front | sglang | environment, and dashboard BUCKET...: servers."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated

import typer

from weightline.errors import InputError
from weightline.extras import check_installed, requires

if TYPE_CHECKING:
    from weightline.chain import Chain

app = typer.Typer(help="Serve a chain: move to each version in place, and back.", no_args_is_help=True)

Follow = Annotated[str, typer.Option(metavar="BUCKET", help="URL of the chain to serve.")]
StateDir = Annotated[Path | None, typer.Option(help="Folder for the mark and the token. Default: ./.weightline/NAME.")]
Name = Annotated[str, typer.Option(help="Name of this replica in leases and records.")]
Host = Annotated[str, typer.Option(help="Address to listen on. Any but a loopback address needs a chosen token.")]
Port = Annotated[
    int, typer.Option(min=0, max=65535, help="0 takes a free port; address.json in the state folder names it.")
]
Every = Annotated[
    float, typer.Option(min=0, metavar="SECONDS", help="Interval of looking for new versions; 0: move on request only.")
]
Ref = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Follow this ref. The ref serving names the newest version that passed its gate."
    ),
]
Drain = Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Longest wait of a refresh for running requests.")]
Lease = Annotated[float, typer.Option(metavar="SECONDS", help="Time for which the replica's lease is valid.")]
Advertise = Annotated[str | None, typer.Option(metavar="URL", help="URL at which others reach this replica.")]
Keys = Annotated[
    Path | None, typer.Option(metavar="KEYFILE", help="Serve only versions that one of these keys signed.")
]
Device = Annotated[str | None, typer.Option(help="torch device. Default: cuda if available, else cpu.")]


@app.command(name="vllm", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def vllm(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Name in requests. A folder also provides files that the chain lacks."),
    ],
    follow: Follow,
    state_dir: StateDir = None,
    name: Name = "replica-0",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    every: Every = 5.0,
    ref: Ref = None,
    drain: Drain = 60.0,
    lease: Lease = 30.0,
    advertise: Advertise = None,
    require_signature: Keys = None,
) -> None:
    """Start vLLM's OpenAI server on the chain's model. Options that are not listed here go to vLLM."""
    check_installed("vllm")
    from weightline.serving.engines.vllm.serve import serve_vllm
    from weightline.serving.http.server import ServerSettings

    settings = ServerSettings(
        chain_url=follow, state_dir=_state_dir(state_dir, name), name=name, host=host, port=port,
        follow_seconds=_follow_seconds(every, ref), follow_ref=ref, drain_seconds=drain, lease_seconds=lease,
        advertise_url=advertise, trusted_keys=require_signature,
    )  # fmt: skip
    serve_vllm(model, settings, context.args)


@app.command(name="transformers")
def transformers(
    follow: Follow,
    state_dir: StateDir = None,
    name: Name = "replica-0",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    every: Every = 5.0,
    ref: Ref = None,
    drain: Drain = 60.0,
    lease: Lease = 30.0,
    advertise: Advertise = None,
    require_signature: Keys = None,
    device: Device = None,
) -> None:
    """Start the embedded server: a transformers model, one request at a time."""
    check_installed("serve")
    from weightline.serving.http.server import ServerSettings, serve

    _log_to_stderr()
    _exit_in_order_at_a_signal()
    settings = ServerSettings(
        chain_url=follow, state_dir=_state_dir(state_dir, name), name=name, host=host, port=port,
        follow_seconds=_follow_seconds(every, ref), follow_ref=ref, device=device, drain_seconds=drain,
        lease_seconds=lease, advertise_url=advertise, trusted_keys=require_signature,
    )  # fmt: skip
    serve(settings)


@app.command(name="front")
def front(
    follow: Annotated[str, typer.Option(metavar="BUCKET", help="URL of the chain whose replicas answer.")],
    replica: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A replica besides those that have a lease. May be given several times."),
    ] = None,
    state_dir: StateDir = None,
    name: Annotated[str, typer.Option(help="Name of this front in its status and its log.")] = "front",
    host: Annotated[str, typer.Option(help="Address to listen on. The routes that generate need no token.")] = (
        "127.0.0.1"
    ),
    port: Port = 8080,
    retry: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="Time for which a request that no replica answers is tried again."),
    ] = 30.0,
) -> None:
    """Start one URL for all replicas of a chain: prefix affinity, retries elsewhere, versions on demand."""
    check_installed("front")
    from weightline.front.server import serve
    from weightline.front.settings import FrontSettings

    _log_to_stderr()
    _exit_in_order_at_a_signal()
    settings = FrontSettings(
        chain_url=follow, state_dir=_state_dir(state_dir, name), name=name, host=host, port=port,
        replica_urls=tuple(replica or ()), retry_seconds=retry,
    )  # fmt: skip
    serve(settings)


@app.command(name="sglang")
def sglang(
    follow: Follow,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder that SGLang's hosts share: its source_dir.")],
    name: Name = "sglang",
    every: Every = 5.0,
    full: Annotated[bool, typer.Option("--full", help="Publish every version as a plain checkpoint.")] = False,
    require_signature: Keys = None,
) -> None:
    """Publish each version as a folder for SGLang's /pull_weights. With --every 0, publish up to the tip and exit."""
    from weightline.chain import open_chain
    from weightline.chain.read.discovery import empty_chain_error, warn_if_empty
    from weightline.format.signature import load_trusted_keys
    from weightline.serving.replica.following import Following

    with requires("serve"):
        from weightline.serving.engines.sglang import Publisher

    _log_to_stderr()
    chain = open_chain(follow, None if require_signature is None else load_trusted_keys(require_signature))
    if every:
        warn_if_empty(chain)
    elif chain.tip_version() is None:
        raise empty_chain_error(follow)
    publisher = Publisher(chain, out, name, lambda folder: typer.echo(str(folder)), is_full=full)
    publisher.run(Following(every) if every else None)


@app.command(name="environment")
def environment(
    name: Annotated[str, typer.Argument(metavar="NAME", help="word-game, the environment that is built in.")],
    host: Annotated[str, typer.Option(help="Address to listen on. There is no login.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port; the first line names it.")] = 8010,
    max_sessions: Annotated[int, typer.Option(min=1, max=4096, help="Episodes at the same time, at the most.")] = 256,
) -> None:
    """Start an environment for multi-turn rollouts: an OpenEnv server, one WebSocket an episode."""
    from weightline.environments import WORD_GAME

    if name != WORD_GAME:
        raise InputError(f"there is no environment {name!r}: name {WORD_GAME}", field="name")
    check_installed("environment")
    from weightline.dashboard.serve import listen

    # Importing OpenEnv takes seconds. An address that is in use is found before.
    with listen(host, port) as listener:
        from weightline.environments.server import serve

        _log_to_stderr()
        _exit_in_order_at_a_signal()
        shown = f"[{host}]" if ":" in host else host
        typer.echo(f"http://{shown}:{listener.getsockname()[1]}")
        serve(listener, max_sessions)


def dashboard(
    buckets: Annotated[
        list[str],
        typer.Argument(metavar="BUCKET...", help="URLs that name chains, or local folders that hold some."),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on. There is no login: keep it on this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 4300,
    prefect_ui: Annotated[str | None, typer.Option(help="URL of a Prefect UI: runs link to it.")] = None,
) -> None:
    """Show chains as a graph with curves, versions and comparisons. Reads only the buckets."""
    from weightline.dashboard.buckets import find_chains

    check_installed("dashboard")
    found = find_chains(buckets)
    from weightline.dashboard.serve import listen, serve

    with listen(host, port) as listener:
        typer.echo(f"http://{host}:{port}")
        # On a thread: a bucket that does not answer must not keep the page from the others.
        Thread(target=_warn_of_empty, args=(found.chains,), daemon=True).start()
        serve(buckets, listener, host=host, prefect_ui=prefect_ui)


def _warn_of_empty(chains: Iterable[Chain]) -> None:
    from weightline.chain.read.discovery import warn_if_empty

    for chain in chains:
        warn_if_empty(chain)


def _log_to_stderr() -> None:
    """Logs what weightline does (starts, moves, refusals), and the warnings of the libraries that it uses."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("weightline").setLevel(logging.INFO)


def _exit_in_order_at_a_signal() -> None:
    """Makes the process run its `finally` blocks and exit with 0: uvicorn raises the signal that ended it again."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))


def _follow_seconds(every: float, ref: str | None) -> float | None:
    """Returns the interval; None to move on request only. InputError for a ref without an interval."""
    if not every and ref is not None:
        raise InputError(
            f"--every 0 moves on request only and never reads the ref {ref!r}: leave out --ref or --every", field="ref"
        )
    return every or None


def _state_dir(given: Path | None, name: str) -> Path:
    return (given or Path(".weightline") / name).absolute()
