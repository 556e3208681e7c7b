"""Runs the benchmarks of codings, digest and threads: `python -m benchmarks [A.safetensors B.safetensors] [--mib 256]`.

Without files, it uses the real rows of the test suite, laid end to end.
"""

from __future__ import annotations

from benchmarks import codec_bench, digest_bench, threads_bench


def main() -> None:
    for bench in (codec_bench, digest_bench, threads_bench):
        bench.main()


if __name__ == "__main__":
    main()
