"""weightline bench codec|peers A B: what your own checkpoints would cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weightline.chain.files.source import FolderSource
from weightline.cli.output import Json, emit, percent, size, table
from weightline.errors import InputError
from weightline.types import BitsArray, TensorSpec

app = typer.Typer(help="Measure codings and peers on two states of one model.", no_args_is_help=True)

State = Annotated[Path, typer.Argument(help="A .safetensors file, or a checkpoint folder.")]


@app.command()
def codec(a: State, b: State, as_json: Json = False) -> None:
    """Every coding on the step from state A to state B: bytes and seconds, one thread."""
    from weightline.bench.codings import bench_codings

    results = bench_codings(_pairs(a, b))
    header = ("coding", "changed", "bytes", "B/changed", "capture", "encode", "decode", "apply", "memcmp", "exact")
    rows = [
        (r.coding, percent(r.num_changed, r.num_elements), size(r.payload_nbytes), f"{r.bytes_per_changed:.3f}",
         *(f"{1000 * s:.1f} ms" for s in (r.capture_seconds, r.encode_seconds, r.decode_seconds, r.apply_seconds,
                                          r.memcmp_seconds)), r.exact)
        for r in results
    ]  # fmt: skip
    emit({"codings": [asdict(r) for r in results]}, table(header, rows), as_json=as_json)
    if not all(r.exact for r in results):
        raise typer.Exit(1)


@app.command()
def peers(a: State, b: State, as_json: Json = False) -> None:
    """The same step in the published layouts of other systems, beside ours. Each is decoded again."""
    from weightline.bench.codings import bench_codings
    from weightline.bench.peers import bench_peers

    pairs = _pairs(a, b)
    theirs, ours = bench_peers(pairs), bench_codings(pairs, repeats=1)
    named = [(r.system, r.layout, r) for r in theirs] + [("weightline", r.coding, r) for r in ours]
    rows = [
        (system, layout, size(r.payload_nbytes), f"{r.bytes_per_changed:.3f}", r.exact) for system, layout, r in named
    ]
    emit(
        {"peers": [asdict(r) for r in theirs], "codings": [asdict(r) for r in ours]},
        table(("system", "layout", "bytes", "B/changed", "exact"), rows),
        as_json=as_json,
    )
    if not all(r.exact for _, _, r in named):
        raise typer.Exit(1)


def _pairs(a: Path, b: Path) -> list[tuple[TensorSpec, BitsArray, BitsArray]]:
    """The tensors of both states, paired. InputError when they are not states of one model."""
    old, new = FolderSource(a), FolderSource(b)
    differing = set(old.specs.items()) ^ set(new.specs.items())
    if differing:
        name = min(name for name, _ in differing)
        raise InputError(
            f"{a} and {b} are no two states of one model: tensor {name} differs or is missing", tensor=name
        )
    return list(_read_pairs(old, new))


def _read_pairs(old: FolderSource, new: FolderSource) -> Iterator[tuple[TensorSpec, BitsArray, BitsArray]]:
    for name, spec in old.specs.items():
        yield spec, old.read([name])[name], new.read([name])[name]
