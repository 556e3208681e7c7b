"""weightline commit | revert | fork | upgrade | tag | keygen | sign: create versions, name them and sign them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightline.cli.chains import open_existing
from weightline.cli.output import (
    DEFAULT_CODING,
    Bucket,
    Coding,
    Json,
    Version,
    VersionOption,
    emit,
    one_version,
    percent,
    table,
    transferring,
)
from weightline.cli.read import summary
from weightline.errors import CorruptError
from weightline.lineage.text import format_nbytes

if TYPE_CHECKING:
    from weightline.chain import Chain
    from weightline.format.manifest import Manifest

_UNTIED = (
    "warning: the adapter's base model is not on this host, so the version records none, and readers cannot check that "
    "they use the right one. Name it with --base FOLDER"
)


def commit(
    bucket: Bucket,
    checkpoint_dir: Annotated[Path, typer.Argument(help="Folder with *.safetensors, config and tokenizer.")],
    stage: Annotated[str, typer.Option(help="Label of the version.")] = "import",
    coding: Coding = DEFAULT_CODING,
    base: Annotated[Path | None, typer.Option(help="An adapter's base model: its folder, or one file.")] = None,
    as_json: Json = False,
) -> None:
    """Commit a checkpoint folder as the chain's next version (the first becomes an anchor).

    Its weights are the files that its index names, else model.safetensors (for an adapter: adapter_model.safetensors).
    A folder that lacks a file, or whose files are ambiguous, is refused.
    """
    from weightline.chain import open_chain
    from weightline.chain.files.assets import is_adapter
    from weightline.chain.write.standalone import commit_folder

    chain = open_chain(bucket)
    with transferring("committing"):
        manifest = commit_folder(chain, checkpoint_dir, stage=stage, coding=coding, base=base)
    if manifest.base_model is None and is_adapter(checkpoint_dir):
        typer.echo(_UNTIED, err=True)
    _report(chain, manifest, as_json)


def _report(chain: Chain, manifest: Manifest, as_json: bool) -> None:
    """Prints the committed version."""
    changed = percent(manifest.num_changed, manifest.num_elements)
    nbytes = f"{format_nbytes(manifest.payload_nbytes)} of {format_nbytes(manifest.full_nbytes)}"
    line = f"version {manifest.version} ({manifest.kind}): {changed} changed, {nbytes}"
    emit(summary(chain, manifest), [line], as_json=as_json)


def revert(
    bucket: Bucket,
    version: Version = None,
    version_option: VersionOption = None,
    as_json: Json = False,
) -> None:
    """Commit a new version whose bits equal those of an earlier one."""
    from weightline.chain.read.refs import resolve
    from weightline.chain.write.standalone import commit_revert

    named = one_version(version, version_option)
    chain = open_existing(bucket)
    _report(chain, commit_revert(chain, resolve(chain, named)), as_json)


def fork(
    bucket: Bucket,
    new_bucket: Annotated[str, typer.Argument(help="URL of the new, empty chain.")],
    version: Version = None,
    version_option: VersionOption = None,
    as_json: Json = False,
) -> None:
    """Start a new chain whose version 0 is a version of this one. Default: the tip."""
    from weightline.chain import open_chain
    from weightline.chain.read.refs import resolve
    from weightline.chain.write.standalone import commit_fork

    chain = open_existing(bucket)
    number = resolve(chain, one_version(version, version_option, "tip"))
    forked = open_chain(new_bucket)
    _report(forked, commit_fork(chain, number, forked), as_json)


def upgrade(bucket: Bucket, as_json: Json = False) -> None:
    """Let the next version of a chain be in format 2. Commits nothing; new chains are in format 2 anyway.

    Releases that read format 1 alone cannot read the chain from that version on. Older versions stay as they are.
    """
    from weightline.chain.write.version import mark_upgraded
    from weightline.format.manifest import FORMAT_1, FORMAT_2

    chain = open_existing(bucket)
    is_marked, tip = mark_upgraded(chain), chain.tip_header()
    line = f"the next version of {chain.url} will be in {FORMAT_2}"
    if tip.format != FORMAT_1:
        line = f"version {tip.version} of {chain.url} is in {tip.format} already"
    emit({"is_marked": is_marked, "tip": tip.version, "format": tip.format, "next_format": FORMAT_2}, [line],
         as_json=as_json)  # fmt: skip


def tag(
    bucket: Bucket,
    name: Annotated[str | None, typer.Argument(help="The name. Without it, names are listed.")] = None,
    version: Version = None,
    version_option: VersionOption = None,
    move: Annotated[
        bool, typer.Option("--move", help="Make a ref, which may be moved later, instead of a tag.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Name a version (default: the tip), or list the names.

    A tag never moves. A ref (--move) may, until it is named without --move.
    """
    from weightline.chain.read.refs import current_refs, move_ref, resolve

    if name is None and (version_option is not None or move):
        raise typer.BadParameter("name the ref, or leave out --version and --move to list the names", param_hint="NAME")
    named = one_version(version, version_option, "tip")
    chain = open_existing(bucket)
    if name is not None:
        move_ref(chain, name, resolve(chain, named), is_tag=not move)
    refs = sorted(current_refs(chain).values(), key=lambda ref: ref.name)
    rows = [(ref.name, ref.version, "tag" if ref.is_tag else "ref", ref.created_at) for ref in refs]
    emit(
        {"refs": [ref.model_dump() for ref in refs]}, table(("name", "version", "kind", "since"), rows), as_json=as_json
    )


def keygen(
    key: Annotated[
        Path, typer.Argument(metavar="FILE", help="New file for the private key. The public key goes to FILE.pub.")
    ],
    as_json: Json = False,
) -> None:
    """Create an Ed25519 key pair for signing manifests and shortcuts."""
    from weightline.format.signature import SIGNING_KEY_VARIABLE, TRUSTED_KEYS_VARIABLE, generate_key

    key_id = generate_key(key)
    public = key.with_name(f"{key.name}.pub")
    emit(
        {"key_id": key_id, "private": str(key), "public": str(public)},
        [
            f"key {key_id}",
            f"writers:  {SIGNING_KEY_VARIABLE}={key}",
            f"readers:  {TRUSTED_KEYS_VARIABLE}={public}",
        ],
        as_json=as_json,
    )


def sign(
    bucket: Bucket,
    key: Annotated[Path, typer.Option(metavar="FILE", help="The private key, as weightline keygen writes it.")],
    quick: Annotated[bool, typer.Option("--quick", help="Verify manifests and object sizes only.")] = False,
    as_json: Json = False,
) -> None:
    """Verify a chain, then sign every manifest and shortcut in it. Writers sign later ones when they write them."""
    from weightline.chain import Chain
    from weightline.chain.read.discovery import empty_chain_error
    from weightline.chain.upkeep.verify import verify_chain
    from weightline.chain.write.commit import sign_existing
    from weightline.format.signature import load_signer
    from weightline.store import open_store

    signer, store = load_signer(key), open_store(bucket)
    found = verify_chain(Chain(store), is_deep=not quick)
    if found.num_versions == 0:
        raise empty_chain_error(bucket)
    if not found.holds:
        first = found.findings[0]
        raise CorruptError(f"{store.url} does not verify, so it is not signed: {first.subject} {first.message}")
    num_signed = sign_existing(store, signer)
    line = f"{num_signed} objects signed by {signer.key_id}"
    emit({"key_id": signer.key_id, "num_signed": num_signed}, [line], as_json=as_json)
