"""Exports commits and evaluations as OpenLineage run events.

It is off unless the environment configures a receiver, by OPENLINEAGE_URL, OPENLINEAGE_CONFIG or
OPENLINEAGE__TRANSPORT__TYPE, as openlineage-python documents them.

A version is a dataset (the chain) in a dataset version; a commit is a run that makes it from its base version, an
evaluation a run that reads it. Run ids are derived from commit ids, so events that are sent twice describe the same
runs. Spec: https://openlineage.io/docs/spec/object-model
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import version as release_of
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from uuid import NAMESPACE_URL, uuid5

from weightline.chain import Chain
from weightline.chain.read.records import EVALUATIONS, read_version_records
from weightline.extras import requires
from weightline.format.manifest import Header

if TYPE_CHECKING:
    from openlineage.client.event_v2 import RunEvent

NAMESPACE = "weightline"
PRODUCER = f"urn:weightline:{release_of('weightline')}"
_SWITCHES = ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG", "OPENLINEAGE__TRANSPORT__TYPE")


def is_enabled(env: Mapping[str, str] = os.environ) -> bool:
    """Returns whether the environment configures a receiver of events."""
    is_off = env.get("OPENLINEAGE_DISABLED", "false").lower() in ("true", "1")
    return not is_off and any(env.get(name) for name in _SWITCHES)


def export_version(chain: Chain, version: int) -> int:
    """Sends the events of the version's commit and its evaluations so far. Returns their number; 0 when not enabled.

    Safe to repeat. Raises VersionNotFoundError, MissingExtraError, and any error of the transport.
    """
    if not is_enabled():
        return 0
    with requires("openlineage"):
        from openlineage.client import OpenLineageClient
    events = list(version_events(chain, version))
    client = OpenLineageClient()
    try:
        for event in events:
            client.emit(event)
    finally:
        client.close()
    return len(events)


def try_export(chain: Chain, version: int, logger: logging.Logger | logging.LoggerAdapter[Any]) -> None:
    """Exports the version's events if the environment names a server. A failure is logged as a warning, never raised.

    So a lineage server cannot make an evaluation or a refresh fail.
    """
    try:
        export_version(chain, version)
    # The transport is third-party code, which may raise any error.
    except Exception as error:  # noqa: BLE001
        logger.warning("no OpenLineage events of version %d: %r", version, error)


def version_events(chain: Chain, version: int) -> Iterator[RunEvent]:
    """Yields the event of the commit, then those of the evaluations. Reads the bucket; sends nothing."""
    manifest = chain.header(version)
    yield commit_event(chain.url, chain.name, manifest)
    for record in read_version_records(chain, EVALUATIONS, version):
        yield evaluation_event(chain.url, chain.name, manifest, record)


def commit_event(url: str, name: str, manifest: Header) -> RunEvent:
    """Returns a finished run that made the version from its base, or a fork's first version from its origin. Pure."""
    from openlineage.client.event_v2 import Job, OutputDataset, Run, RunEvent, RunState
    from openlineage.client.facet_v2 import output_statistics_output_dataset

    origin = manifest.forked_from
    base = (url, manifest.base_version) if origin is None else (origin.chain, origin.version)
    made = _versioned(url, manifest.version)
    size = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(size=manifest.payload_nbytes)
    facts = {
        "kind": manifest.kind, "version": manifest.version, "globalStep": manifest.global_step,
        "commitId": manifest.commit_id, "numChanged": manifest.num_changed, "numElements": manifest.num_elements,
        "payloadNbytes": manifest.payload_nbytes, "fullNbytes": manifest.full_nbytes, "runId": manifest.run_id,
    }  # fmt: skip
    return RunEvent(
        eventType=RunState.COMPLETE,
        eventTime=manifest.created_at,
        producer=PRODUCER,
        run=Run(_run_id(url, manifest.commit_id), {"weightline_commit": _facet(facts)}),
        job=Job(NAMESPACE, f"{name}.{manifest.stage}"),
        inputs=[] if base[1] is None else [_input(base[0], base[1])],
        outputs=[OutputDataset(made["namespace"], made["name"], {"outputStatistics": size}, facets=made["facets"])],
    )


def evaluation_event(url: str, name: str, manifest: Header, record: Mapping[str, Any]) -> RunEvent:
    """Returns a run that read the version: complete with its score, or aborted when the version was skipped. Pure."""
    from openlineage.client.event_v2 import Job, Run, RunEvent, RunState

    states = {"done": RunState.COMPLETE, "skipped": RunState.ABORT}
    exported = ("status", "score", "metrics", "num_problems", "newer_version")
    facts = {key: record[key] for key in exported if key in record}
    return RunEvent(
        eventType=states.get(record["status"], RunState.FAIL),
        eventTime=record["recorded_at"],
        producer=PRODUCER,
        run=Run(_run_id(url, f"{manifest.commit_id}/{record['name']}"), {"weightline_evaluation": _facet(facts)}),
        job=Job(NAMESPACE, f"{name}.evaluate.{record['name']}"),
        inputs=[_input(url, manifest.version)],
        outputs=[],
    )


def dataset_name(url: str) -> tuple[str, str]:
    """Returns (namespace, name) by OpenLineage's naming: `s3://bucket` and a key, `file` and an absolute path."""
    parts = urlsplit(url)
    if parts.netloc:
        return f"{parts.scheme}://{parts.netloc}", unquote(parts.path).strip("/") or "/"
    return parts.scheme or "file", unquote(parts.path)


def _input(url: str, version: int) -> Any:
    from openlineage.client.event_v2 import InputDataset

    read = _versioned(url, version)
    return InputDataset(read["namespace"], read["name"], facets=read["facets"])


def _versioned(url: str, version: int) -> dict[str, Any]:
    from openlineage.client.facet_v2 import dataset_version_dataset

    namespace, name = dataset_name(url)
    facet = dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=str(version))
    return {"namespace": namespace, "name": name, "facets": {"version": facet}}


def _facet(facts: Mapping[str, Any]) -> Any:
    """Returns a custom facet with these fields."""
    from openlineage.client.facet_v2 import RunFacet

    return RunFacet(producer=PRODUCER).with_additional_properties(**facts)


def _run_id(url: str, what: str) -> str:
    return str(uuid5(NAMESPACE_URL, f"{url}#{what}"))
