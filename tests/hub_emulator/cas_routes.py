"""The content store's HTTP API, as hf_xet speaks it."""

from __future__ import annotations

from tests.hub_emulator.content import Piece
from tests.hub_emulator.emulator import HubEmulator
from tests.hub_emulator.wire import Request, Response, as_json, error


def put_xorb(emulator: HubEmulator, request: Request, xorb: str) -> Response:
    return as_json({"was_inserted": emulator.content.put_xorb(xorb, request.body)})


def put_shard(emulator: HubEmulator, request: Request) -> Response:
    try:
        emulator.content.put_shard(request.body)
    except ValueError as problem:
        return error(400, str(problem))
    return as_json({"result": 1})


def reconstruct(emulator: HubEmulator, request: Request, api: str, file_hash: str) -> Response:
    nbytes = emulator.content.nbytes_of(file_hash)
    if nbytes is None:
        return error(404, "file not found")
    wanted = request.byte_range(nbytes)
    if wanted is None:
        return error(416, "past the end")
    skip, pieces = emulator.content.reconstruct(file_hash, *wanted)
    terms = [
        {
            "hash": piece.xorb,
            "unpacked_length": piece.nbytes,
            "range": {"start": piece.first_chunk, "end": piece.end_chunk},
        }
        for piece in pieces
    ]
    sources = _sources_v2(emulator, pieces) if api == "2" else _sources_v1(emulator, pieces)
    return as_json({"offset_into_first_range": skip, "terms": terms} | sources)


def _sources_v1(emulator: HubEmulator, pieces: list[Piece]) -> dict[str, object]:
    sources: dict[str, list[object]] = {}
    for piece in dict.fromkeys(pieces):
        sources.setdefault(piece.xorb, []).append(
            {
                "range": {"start": piece.first_chunk, "end": piece.end_chunk},
                "url": f"{emulator.url}/xorb/{piece.xorb}",
                "url_range": {"start": piece.url_start, "end": piece.url_end},
            }
        )
    return {"fetch_info": sources}


def _sources_v2(emulator: HubEmulator, pieces: list[Piece]) -> dict[str, object]:
    """One range for each URL: the client then needs no multipart replies."""
    sources: dict[str, list[object]] = {}
    for piece in dict.fromkeys(pieces):
        span = {
            "chunks": {"start": piece.first_chunk, "end": piece.end_chunk},
            "bytes": {"start": piece.url_start, "end": piece.url_end},
        }
        sources.setdefault(piece.xorb, []).append({"url": f"{emulator.url}/xorb/{piece.xorb}", "ranges": [span]})
    return {"xorbs": sources}


def get_xorb(emulator: HubEmulator, request: Request, xorb: str) -> Response:
    path = emulator.content.xorb_path(xorb)
    if not path.exists():
        return error(404, "no such xorb")
    nbytes = path.stat().st_size
    wanted = request.byte_range(nbytes)
    if wanted is None:
        return error(416, "past the end")
    with path.open("rb") as file:
        file.seek(wanted[0])
        body = file.read(wanted[1] - wanted[0] + 1)
    headers = {"Content-Range": f"bytes {wanted[0]}-{wanted[1]}/{nbytes}", "Content-Type": "application/octet-stream"}
    return Response(206, body, headers)


def telemetry(_emulator: HubEmulator, _request: Request) -> Response:
    return as_json({})


_HASH = "([0-9a-f]{64})"
ROUTES = [
    (("POST",), rf"(?:/v1)?/xorbs?/default/{_HASH}", put_xorb),
    (("POST",), r"(?:/v1)?/shards", put_shard),
    (("GET",), rf"(?:/v([12]))?/reconstructions?/{_HASH}", reconstruct),
    (("GET",), rf"/xorb/{_HASH}", get_xorb),
    (("POST",), r"/v1/telemetry", telemetry),
]
