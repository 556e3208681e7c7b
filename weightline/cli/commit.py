"""weightline commit BUCKET CHECKPOINT_DIR: any trainer's checkpoint as the next version."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightline.chain import open_chain
from weightline.chain.files.assets import is_adapter
from weightline.chain.write.standalone import DEFAULT_CODING, commit_folder
from weightline.cli.log import summary
from weightline.cli.output import Bucket, Json, emit, percent, size
from weightline.cli.progress import transferring
from weightline.format.manifest import Manifest

UNTIED = (
    "warning: the adapter's base model is not here, so the version is tied to none, and nothing can tell whether the "
    "adapter is put on the right one. Name it with --base FOLDER"
)


def run(
    bucket: Bucket,
    checkpoint_dir: Annotated[Path, typer.Argument(help="Folder with *.safetensors, config and tokenizer.")],
    stage: Annotated[str, typer.Option(help="Label of the version.")] = "import",
    coding: Annotated[str, typer.Option(help="How the payload is coded.")] = DEFAULT_CODING,
    base: Annotated[Path | None, typer.Option(help="An adapter's base model: its folder, or one file.")] = None,
    as_json: Json = False,
) -> None:
    """Commit a checkpoint folder as the chain's next version (the first becomes an anchor).

    Its weights are what its index names, else model.safetensors (an adapter's: adapter_model.safetensors). A folder
    that lacks a part, or that loaders would read in two ways, is refused.
    """
    with transferring("committing"):
        manifest = commit_folder(open_chain(bucket), checkpoint_dir, stage=stage, coding=coding, base=base)
    if manifest.base_model is None and is_adapter(checkpoint_dir):
        typer.echo(UNTIED, err=True)
    report(manifest, as_json)


def report(manifest: Manifest, as_json: bool) -> None:
    """Say what was committed."""
    changed = percent(manifest.num_changed, manifest.num_elements)
    nbytes = f"{size(manifest.payload_nbytes)} of {size(manifest.full_nbytes)}"
    line = f"version {manifest.version} ({manifest.kind}): {changed} changed, {nbytes}"
    emit(summary(manifest), [line], as_json=as_json)
