"""`python -m tests.places.report CHAIN MODEL_DIR`: prints, as JSON, what one place sees of a chain in the bucket."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from weightline.chain import Chain, open_chain
from weightline.chain.read.records import REFRESHES, SAMPLES, read_records
from weightline.chain.upkeep.verify import verify_chain
from weightline.runs.stage import differing_tensors


def report(chain: Chain, model_dir: Path) -> dict[str, Any]:
    """Returns the versions, each replayed and compared with its digests, and the records beside them."""
    verified = verify_chain(chain)
    manifests = list(chain.manifests())
    return {
        "findings": [finding.message for finding in verified.findings],
        "num_versions": verified.num_versions,
        "global_steps": [manifest.global_step for manifest in manifests],
        "num_changed": [manifest.num_changed for manifest in manifests],
        "differing": differing_tensors(chain, manifests[-1].version, model_dir),
        "samples": read_records(chain, SAMPLES),
        "served": sorted(one["version"] for one in read_records(chain, REFRESHES) if one["status"] == "done"),
    }


if __name__ == "__main__":
    print(json.dumps(report(open_chain(sys.argv[1]), Path(sys.argv[2]))))
