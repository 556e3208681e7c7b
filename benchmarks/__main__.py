"""All benchmarks, one after the other: `python -m benchmarks [A.safetensors B.safetensors] [--mib 256]`.

Without states, on the test suite's few real rows laid end to end.
"""

from __future__ import annotations

from benchmarks import codec_bench, digest_bench, threads_bench


def main() -> None:
    for bench in (codec_bench, digest_bench, threads_bench):
        bench.main()


if __name__ == "__main__":
    main()
