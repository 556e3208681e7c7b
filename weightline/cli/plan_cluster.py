"""weightline plan-cluster: bytes, seconds and memory for a model and a cluster that are not at hand."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from weightline.bench.cluster import Cluster, plan_cluster
from weightline.cli.output import Json, emit, size


def _per_second(what: str) -> Any:
    return typer.Option(help=f"Elements a second: {what}.")


def run(
    params: Annotated[float, typer.Option(help="Parameters of the model, as in 1e12.")],
    ranks: Annotated[int, typer.Option(help="Training ranks; each holds and publishes its part.")],
    density: Annotated[float, typer.Option(help="Share of elements that change between two syncs.")] = 0.01,
    itemsize: Annotated[int, typer.Option(help="Bytes of one element.")] = 2,
    coding: Annotated[str, typer.Option(help="gap or gap-by-magnitude.")] = "gap-by-magnitude",
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
    """Compute what a sync would cost; docs/performance.md says how the model was checked, and where rates come from."""
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
        return size(value)
    if name.endswith("_seconds"):
        return f"{value:.3f} s"
    return f"{value:.4f}"
