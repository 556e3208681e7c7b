"""Measures the speed of the state digest's full scan.

python -m benchmarks.digest_bench [A.safetensors B.safetensors] [--mib 256]
"""

from __future__ import annotations

import argparse

from benchmarks.states import parse_states
from benchmarks.timing import least_cpu_seconds, memcmp_cpu_seconds
from weightline.codec.digest import tensor_digest
from weightline.types import whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tensor, old_N, _ = parse_states(parser)
    segment = whole(tensor)
    seconds, _ = least_cpu_seconds(lambda: tensor_digest(segment, old_N))
    ratio = memcmp_cpu_seconds(old_N) / seconds
    print(f"digest            {old_N.nbytes / seconds / 1e9:.2f} GB/s a core  {ratio:.2f} x memcmp")


if __name__ == "__main__":
    main()
