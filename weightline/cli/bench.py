"""weightline bench codec | peers A B, and plan-cluster: measure or estimate the costs of checkpoints and clusters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightline.cli.output import DEFAULT_CODING, Coding, Json, emit, percent, table
from weightline.errors import InputError
from weightline.lineage.text import format_nbytes

if TYPE_CHECKING:
    from weightline.chain.files.source import FolderSource
    from weightline.types import BitsArray, TensorSpec

app = typer.Typer(help="Measure codings and peers on two states of one model.", no_args_is_help=True)

State = Annotated[Path, typer.Argument(help="A .safetensors file, or a checkpoint folder.")]


@app.command()
def codec(a: State, b: State, as_json: Json = False) -> None:
    """Measure every coding on the step from state A to state B: bytes and seconds, on one thread."""
    from weightline.bench.codings import bench_codings

    results = bench_codings(_pairs(a, b))
    header = ("coding", "changed", "bytes", "B/changed", "capture", "encode", "decode", "apply", "memcmp", "exact")
    rows = [
        (r.coding, percent(r.num_changed, r.num_elements), format_nbytes(r.payload_nbytes),
         f"{r.bytes_per_changed:.3f}",
         *(f"{1000 * s:.1f} ms" for s in (r.capture_seconds, r.encode_seconds, r.decode_seconds, r.apply_seconds,
                                          r.memcmp_seconds)), r.exact)
        for r in results
    ]  # fmt: skip
    emit({"codings": [asdict(r) for r in results]}, table(header, rows), as_json=as_json)
    if not all(r.exact for r in results):
        raise typer.Exit(1)


@app.command()
def peers(a: State, b: State, as_json: Json = False) -> None:
    """Measure the same step in the published layouts of other systems and in ours. Each result is decoded again."""
    from weightline.bench.codings import bench_codings
    from weightline.bench.peers import bench_peers

    pairs = _pairs(a, b)
    theirs, ours = bench_peers(pairs), bench_codings(pairs, repeats=1)
    named = [(r.system, r.layout, r) for r in theirs] + [("weightline", r.coding, r) for r in ours]
    rows = [
        (system, layout, format_nbytes(r.payload_nbytes), f"{r.bytes_per_changed:.3f}", r.exact)
        for system, layout, r in named
    ]
    emit(
        {"peers": [asdict(r) for r in theirs], "codings": [asdict(r) for r in ours]},
        table(("system", "layout", "bytes", "B/changed", "exact"), rows),
        as_json=as_json,
    )
    if not all(r.exact for _, _, r in named):
        raise typer.Exit(1)


def _pairs(a: Path, b: Path) -> list[tuple[TensorSpec, BitsArray, BitsArray]]:
    """Returns (spec, bits in A, bits in B) of every tensor. InputError when they are not states of one model."""
    from weightline.chain.files.source import FolderSource

    old, new = FolderSource(a), FolderSource(b)
    differing = set(old.specs.items()) ^ set(new.specs.items())
    if differing:
        name = min(name for name, _ in differing)
        raise InputError(f"{a} and {b} are not states of one model: tensor {name} differs or is missing", tensor=name)
    return list(_read_pairs(old, new))


def _read_pairs(old: FolderSource, new: FolderSource) -> Iterator[tuple[TensorSpec, BitsArray, BitsArray]]:
    for name, spec in old.specs.items():
        yield spec, old.read([name])[name], new.read([name])[name]


def _per_second(what: str) -> Any:
    return typer.Option(help=f"Elements a second: {what}.")


def plan_cluster(
    params: Annotated[float, typer.Option(help="Parameters of the model, as in 1e12.")],
    ranks: Annotated[int, typer.Option(help="Training ranks; each holds and publishes its part.")],
    density: Annotated[float, typer.Option(help="Share of elements that change between two syncs.")] = 0.01,
    itemsize: Annotated[int, typer.Option(help="Bytes of one element.")] = 2,
    coding: Coding = DEFAULT_CODING,
    uplink_gbps: Annotated[float, typer.Option(help="Gigabits a second from one rank to the bucket.")] = 25.0,
    downlink_gbps: Annotated[float, typer.Option(help="Gigabits a second from the bucket to one reader rank.")] = 25.0,
    reader_ranks: Annotated[int, typer.Option(help="Ranks of one serving replica.")] = 8,
    capture_elements_per_second: Annotated[float, _per_second("compared by one training rank")] = 1.5e9,
    encode_elements_per_second: Annotated[float, _per_second("changed ones, coded by one training rank")] = 40e6,
    decode_elements_per_second: Annotated[float, _per_second("changed ones, decoded by one reader rank")] = 10e6,
    apply_elements_per_second: Annotated[float, _per_second("changed ones, scattered by one reader rank")] = 50e6,
    commit_seconds: Annotated[float, typer.Option(help="Gathering the ranks' facts and the create-only put.")] = 0.3,
    as_json: Json = False,
) -> None:
    """Estimate the cost of a sync. docs/performance.md describes the sources of the rates and their checks."""
    from weightline.bench.cluster import Cluster, plan_cluster

    cluster = Cluster(
        num_params=params, num_ranks=ranks, density=density, itemsize=itemsize, coding=coding,
        uplink_gbps=uplink_gbps, downlink_gbps=downlink_gbps, num_reader_ranks=reader_ranks,
        capture_elements_per_second=capture_elements_per_second,
        encode_elements_per_second=encode_elements_per_second,
        decode_elements_per_second=decode_elements_per_second,
        apply_elements_per_second=apply_elements_per_second, commit_seconds=commit_seconds,
    )  # fmt: skip
    cost = asdict(plan_cluster(cluster))
    lines = [f"{name:<26} {_readable(name, value)}" for name, value in cost.items()]
    emit({"cluster": asdict(cluster), "cost": cost}, lines, as_json=as_json)


def _readable(name: str, value: float) -> str:
    if "nbytes" in name:
        return format_nbytes(value)
    if name.endswith("_seconds"):
        return f"{value:.3f} s"
    return f"{value:.4f}"
