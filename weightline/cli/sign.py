"""weightline sign BUCKET --key FILE: vouch for what the chain holds now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightline.chain import Chain
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.commit import sign_existing
from weightline.cli.output import Bucket, Json, emit
from weightline.errors import ChainEmptyError, CorruptError
from weightline.format.signature import load_signer
from weightline.store import open_store


def run(
    bucket: Bucket,
    key: Annotated[Path, typer.Option(metavar="FILE", help="The private key, as weightline keygen writes it.")],
    quick: Annotated[bool, typer.Option("--quick", help="Verify manifests and object sizes only.")] = False,
    as_json: Json = False,
) -> None:
    """Verify a chain, then sign every manifest and shortcut in it. Later ones are signed as they are written."""
    signer, store = load_signer(key), open_store(bucket)
    report = verify_chain(Chain(store), is_deep=not quick)
    if report.num_versions == 0:
        raise ChainEmptyError(f"{store.url} holds no version: is the URL right?", chain=store.url)
    if not report.holds:
        first = report.findings[0]
        raise CorruptError(f"{store.url} does not verify, so it is not signed: {first.subject} {first.message}")
    num_signed = sign_existing(store, signer)
    line = f"{num_signed} objects signed by {signer.key_id}"
    emit({"key_id": signer.key_id, "num_signed": num_signed}, [line], as_json=as_json)
