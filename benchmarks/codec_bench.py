"""Measures the speed of the codings with one thread, on buffers far larger than the caches.

    python -m benchmarks.codec_bench [A.safetensors B.safetensors] [--mib 256]

Seconds are thread CPU time, the least of the repeats, since wall time on a shared machine depends on other processes.
Ratios carry over to other machines, seconds do not.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.states import parse_states
from benchmarks.timing import least_cpu_seconds, memcmp_cpu_seconds
from weightline.codec.capture import capture
from weightline.codec.coding import codings
from weightline.format.payload import open_payload
from weightline.format.write_payload import write_delta
from weightline.types import BitsArray, TensorSpec, whole


def measure(coding: str, is_ranked: bool, tensor: TensorSpec, old_N: BitsArray, new_N: BitsArray) -> str:
    """Measures one coding and returns its line of the report."""
    segment = whole(tensor)
    memcmp_seconds = memcmp_cpu_seconds(old_N)
    capture_seconds, changes = least_cpu_seconds(lambda: capture(segment, old_N, new_N, ranked=is_ranked))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "payload.safetensors"
        encode_seconds, info = least_cpu_seconds(lambda: write_delta(path, [changes], coding), before=path.unlink)
        decode_seconds, _ = least_cpu_seconds(lambda: list(open_payload(path).read_changes(None, lambda _: old_N)))
    num_changed = max(info.num_changed, 1)
    return (
        f"{coding:17} {100 * info.num_changed / info.num_elements:.2f} % changed  "
        f"{info.nbytes / num_changed:.3f} B/changed  capture {memcmp_seconds / capture_seconds:.2f} x memcmp  "
        f"encode {encode_seconds / capture_seconds:.2f} x capture, "
        f"{1e9 * encode_seconds / num_changed:.1f} ns/changed  "
        f"decode {1e9 * decode_seconds / num_changed:.1f} ns/changed"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tensor, old_N, new_N = parse_states(parser)
    for name, coding in codings().items():
        print(measure(name, coding.ranked, tensor, old_N, new_N), flush=True)


if __name__ == "__main__":
    main()
