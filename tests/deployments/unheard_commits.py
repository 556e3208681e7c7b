"""Plays rank 0 for tests: commits two versions and announces them to a server that is down.

python -m tests.deployments.unheard_commits CHAIN_URL, with PREFECT_API_URL of nobody
"""

from __future__ import annotations

import os
import sys

from tests.chains import commit_state, nudged, random_state
from weightline.chain import open_chain
from weightline.deployments.prefect_private import send_events_to
from weightline.deployments.ranks.outbox import EventOutbox
from weightline.deployments.server.events import announce_commit


def main() -> None:
    chain = open_chain(sys.argv[1])
    send_events_to(EventOutbox(os.environ["PREFECT_API_URL"]))
    state = random_state(0)
    manifests = [commit_state(chain, state, is_milestone=True), commit_state(chain, nudged(state, 1), state)]
    for manifest in manifests:
        announce_commit(chain.url, manifest)


if __name__ == "__main__":
    main()
