"""Parses fuzzed bytes as a header, manifest or shortcut: a typed error, or an object that survives a round trip.

python -m fuzz.manifest -max_total_time=60
"""

from __future__ import annotations

import atheris

from fuzz.inputs import ROOT, fuzz

with atheris.instrument_imports(include=["weightline"]):
    from weightline.errors import ManifestError, UnsupportedFeatureError
    from weightline.format.header import parse_header
    from weightline.format.manifest import Manifest
    from weightline.format.shortcut import Shortcut

#: Manifests of the frozen chains are larger than the payloads of the conformance cases.
_CHAINS = ROOT / "tests" / "compat" / "data"


def one_input(data: bytes) -> None:
    for parse in (parse_header, Manifest.from_bytes, Shortcut.from_bytes):
        try:
            found = parse(data)
        except (ManifestError, UnsupportedFeatureError):
            continue
        assert parse(found.to_bytes()) == found


def seeds() -> list[bytes]:
    """Returns headers, manifests and shortcuts that releases wrote, and some invalid ones."""
    written = [path.read_bytes() for folder in ("commits", "shortcuts") for path in _CHAINS.glob(f"*/{folder}/*.json")]
    return [*written, b"{}", b"[]", b'{"format":"weightline/3"}', b'{"format":"weightline/1","features":["x"]}']


if __name__ == "__main__":
    fuzz("manifest", one_input, seeds())
