"""Measures versions and records the scores. Importing this is cheap; the first measurement imports the harness."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from weightline.chain import Chain
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.read.overtaken import Overtaken
from weightline.chain.read.records import EVALUATIONS, Record, read_record, write_record
from weightline.evaluation.task import EvaluationTask, check_task
from weightline.extras import check_installed


def skip_overtaken(chain: Chain, overtaken: Overtaken, task: EvaluationTask) -> Record:
    """Records that versions are skipped for a newer one. Returns the record of the first. Safe to repeat.

    A version that has a record keeps it.
    """
    skipped: Record = {"status": "skipped", "newer_version": overtaken.newer_version}
    records = [write_record(chain, EVALUATIONS, version, task.name, skipped) for version in overtaken.versions]
    return records[0]


def wait_or_measure(
    chain: Chain, version: int, task: EvaluationTask, work_dir: Path, wait_seconds: float, poll_seconds: float = 1.0
) -> Record:
    """Waits for the record of an evaluation in another process. Measures the version here after `wait_seconds`."""
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline:
        record = read_record(chain, EVALUATIONS, version, task.name)
        if record is not None:
            return record
        time.sleep(poll_seconds)
    return measure_version(chain, version, task, work_dir)


def measure_version(
    chain: Chain, version: int, task: EvaluationTask, work_dir: Path, device: str | None = None
) -> Record:
    """Measures a version and writes the record: score, metrics, num_problems, seconds, commit_id and state_digest.

    If there is a record already, it is returned and nothing is measured. Safe to repeat. Temporary files and the data
    cache go below `work_dir`; a crash leaves folders `evaluating-*` there. VersionNotFoundError; InputError for a task
    that cannot be run or a harness that is not installed; DigestMismatchError when the checkpoint is not the version's.
    """
    check_installed("eval")
    check_task(task)
    manifest = chain.manifest(version)
    earlier = read_record(chain, EVALUATIONS, version, task.name)
    if earlier is not None:
        return earlier
    # Imported here, since planning and skipping need no torch, whose import takes seconds.
    from weightline.evaluation.checkpoint import prove_checkpoint
    from weightline.evaluation.harness import run_harness

    started = time.perf_counter()
    work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="evaluating-", dir=work_dir) as name:
        folder = Path(name) / "checkpoint"
        write_checkpoint(chain, version, folder)
        digest = prove_checkpoint(folder, manifest)
        scores = run_harness(folder, task, work_dir / "datasets", device)
    record: Record = {
        "status": "done",
        "score": scores.score,
        "metrics": scores.metrics,
        "num_problems": scores.num_problems,
        "seconds": round(time.perf_counter() - started, 3),
        "commit_id": manifest.commit_id,
        "state_digest": digest,
    }
    return write_record(chain, EVALUATIONS, version, task.name, record)
