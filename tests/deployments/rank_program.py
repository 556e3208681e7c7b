"""Plays one rank for tests: runs publish steps on a background thread, as the trainer does, and prints what happened.

python -m tests.deployments.rank_program NUM_VERSIONS RANK WORLD_SIZE
"""

from __future__ import annotations

import json
import sys
import threading
import time

from tests.chains import commit_state, random_state
from weightline.chain.read.history import Chain
from weightline.store.memory import MemoryStore
from weightline.trainer.steps import Step, StepFacts, StepName, StepObserver, load_observer

CHAIN = "memory://toy"
RANK_STEPS: tuple[StepName, ...] = ("gather_partition", "compute_delta", "upload_payload")


def publish(observer: StepObserver, num_versions: int, rank: int, world_size: int) -> dict[str, list[float]]:
    """Returns how long each step took, by its label: what it does is next to nothing, so this is what Prefect costs."""
    seconds: dict[str, list[float]] = {}
    manifest = commit_state(Chain(MemoryStore(CHAIN)), random_state(0))
    for version in range(num_versions):
        names: list[StepName] = [*RANK_STEPS, *(["commit_version"] if rank == 0 else [])]  # type: ignore[list-item]
        facts = {"version": version, "commit_id": f"{version:032x}", "num_changed": 5, "num_elements": 100}
        committed = manifest.model_copy(update={**facts, "payload_nbytes": 600})
        for name in names:
            started = time.perf_counter()
            with Step(name, version, rank, world_size, CHAIN, observer) as step:
                is_commit = name == "commit_version"
                step.report(StepFacts.of_commit(committed) if is_commit else StepFacts(num_changed=5, num_elements=100))
            assert step.wait().num_changed == 5
            seconds.setdefault(f"{name} {version}", []).append(time.perf_counter() - started)
    return seconds


def main() -> None:
    num_versions, rank, world_size = (int(text) for text in sys.argv[1:])
    observer = load_observer(None)
    seconds: dict[str, list[float]] = {}
    thread = threading.Thread(target=lambda: seconds.update(publish(observer, num_versions, rank, world_size)))
    thread.start()
    thread.join()
    observer.close()
    sys.stdout.write(json.dumps({"observer": type(observer).__name__, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
