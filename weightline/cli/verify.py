"""weightline verify BUCKET: everything that can be seen to hold. Exit code 0 only when all does."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weightline.chain import open_chain
from weightline.chain.upkeep.verify import verify_chain
from weightline.cli.output import Bucket, Json, emit
from weightline.errors import ChainEmptyError
from weightline.format.signature import load_trusted_keys


def run(
    bucket: Bucket,
    quick: Annotated[bool, typer.Option("--quick", help="Look at manifests and object sizes; replay nothing.")] = False,
    require_signature: Annotated[
        Path | None, typer.Option(metavar="KEYFILE", help="Every manifest and shortcut must be signed by one of these.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check manifests, objects, digests and every way into every version; signatures when a key is given."""
    chain = open_chain(bucket, None if require_signature is None else load_trusted_keys(require_signature))
    report = verify_chain(chain, is_deep=not quick)
    if report.num_versions == 0 and report.holds:
        raise ChainEmptyError(f"{chain.url} holds no version: is the URL right?", chain=chain.url)
    verdict = "all holds" if report.holds else f"{len(report.findings)} findings"
    counts = f"{report.num_versions} versions, {report.num_shortcuts} shortcuts, {report.num_objects} objects"
    looked = f"{counts}, commit mode {report.commit_mode}"
    lines = [f"{f.rule}: {f.subject}: {f.message}" for f in report.findings]
    emit(asdict(report) | {"holds": report.holds}, [*lines, f"{looked}: {verdict}"], as_json=as_json)
    if not report.holds:
        raise typer.Exit(1)
