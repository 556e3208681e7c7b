"""Plays one rank for tests: runs publish steps on a background thread, as the trainer does, and tells what happened.

python -m tests.deployments.rank_program NUM_VERSIONS RANK WORLD_SIZE
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable

from weightline.trainer.steps import Facts, PublishSteps, StepWork, load_steps

CHAIN = "memory://toy"


def publish(steps: PublishSteps, num_versions: int, rank: int, world_size: int, told: dict[str, list[float]]) -> None:
    """Each step notes that it ran; how long the whole took is what Prefect costs."""
    for version in range(num_versions):
        names = ["gather_partition", "compute_delta", "upload_payload", *(["commit_version"] if rank == 0 else [])]
        for name in names:
            started = time.perf_counter()
            work = StepWork(name, version, rank, world_size, "sft", CHAIN, _step(f"{name} {version}", version, told))
            facts = getattr(steps, name)(work)
            assert facts["version"] == version
            told["seconds"].append(time.perf_counter() - started)


def _step(label: str, version: int, told: dict[str, list[float]]) -> Callable[[], Facts]:
    def run() -> Facts:
        told.setdefault(label, []).append(version)
        return {
            "version": version,
            "commit_id": f"{version:032x}",
            "num_changed": 5,
            "num_elements": 100,
            "stage": "sft",
        }

    return run


def main() -> None:
    num_versions, rank, world_size = (int(text) for text in sys.argv[1:])
    told: dict[str, list[float]] = {"seconds": []}
    steps = load_steps(None)
    thread = threading.Thread(target=publish, args=(steps, num_versions, rank, world_size, told))
    thread.start()
    thread.join()
    sys.stdout.write(json.dumps({"steps": type(steps).__name__, **told}) + "\n")


if __name__ == "__main__":
    main()
