"""`python -m tests.hub_emulator [--root DIR] [--host ADDRESS] [--port N]`: prints its URL, serves until it is ended."""

from __future__ import annotations

import argparse
import tempfile
import threading
from pathlib import Path

from tests.hub_emulator.server import running_emulator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, help="Where content goes; a temporary folder when left out.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--list-lag-seconds", type=float, default=0.0)
    parser.add_argument("--info-lag-seconds", type=float, default=0.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hub-emulator-") as folder:
        with running_emulator(options.root or Path(folder), port=options.port, host=options.host) as emulator:
            emulator.list_lag_seconds = options.list_lag_seconds
            emulator.info_lag_seconds = options.info_lag_seconds
            print(emulator.url, flush=True)
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                pass


if __name__ == "__main__":
    main()
