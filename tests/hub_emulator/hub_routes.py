"""The Hub's bucket API."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Callable
from functools import wraps
from urllib.parse import urlencode

from tests.hub_emulator.buckets import Bucket, FileEntry, is_valid_path
from tests.hub_emulator.content_access import read_content
from tests.hub_emulator.emulator import HubEmulator, iso
from tests.hub_emulator.wire import Request, Response, as_json, error

Answer = Callable[..., Response]
_TOKEN_SECONDS = 3600


def _needs(role: str) -> Callable[[Answer], Answer]:
    """Answer 401 or 403 as the token deserves, 404 when the bucket of the path is not there."""

    def decorate(answer: Answer) -> Answer:
        @wraps(answer)
        def guarded(emulator: HubEmulator, request: Request, bucket_id: str, *rest: str) -> Response:
            refused = refusal(emulator, request, role)
            if refused:
                return refused
            if bucket_id not in emulator.buckets:
                return error(404, "Bucket not found", "RepoNotFound")
            return answer(emulator, request, bucket_id, *rest)

        return guarded

    return decorate


def refusal(emulator: HubEmulator, request: Request, role: str) -> Response | None:
    granted = emulator.roles.get(request.token, "write")
    if granted == "none":
        return error(401, "Invalid credentials in Authorization header")
    if granted == "read" and role == "write":
        return error(403, "You have read access but not the required permissions for this operation")
    return None


def create(emulator: HubEmulator, request: Request, namespace: str, name: str) -> Response:
    refused = refusal(emulator, request, "write")
    if refused:
        return refused
    bucket_id = f"{namespace}/{name}"
    url = f"{emulator.url}/buckets/{bucket_id}"
    wanted = json.loads(request.body or b"{}")
    with emulator.lock:
        if bucket_id in emulator.buckets:
            return as_json({"error": "You already created this bucket", "url": url}, status=409)
        emulator.buckets[bucket_id] = Bucket(wanted.get("visibility") == "private", emulator.now_ms())
    return as_json({"url": url, "name": bucket_id, "id": bucket_id})


@_needs("read")
def info(emulator: HubEmulator, _request: Request, bucket_id: str) -> Response:
    bucket = emulator.buckets[bucket_id]
    files = bucket.files()
    return as_json(
        {
            "id": bucket_id,
            "private": bucket.is_private,
            "visibility": "private" if bucket.is_private else "public",
            "createdAt": iso(bucket.created_ms),
            "updatedAt": iso(max((f.uploaded_ms for f in files.values()), default=bucket.created_ms)),
            "size": sum(f.size for f in files.values()),
            "totalFiles": len(files),
        }
    )


@_needs("write")
def delete(emulator: HubEmulator, _request: Request, bucket_id: str) -> Response:
    del emulator.buckets[bucket_id]
    return as_json({})


@_needs("read")
def read_token(emulator: HubEmulator, _request: Request, _bucket_id: str) -> Response:
    return _token(emulator, "read")


@_needs("write")
def write_token(emulator: HubEmulator, _request: Request, _bucket_id: str) -> Response:
    return _token(emulator, "write")


def _token(emulator: HubEmulator, kind: str) -> Response:
    expires = int(time.time()) + _TOKEN_SECONDS
    headers = {
        "X-Xet-Cas-Url": emulator.url,
        "X-Xet-Access-Token": f"{kind}-token",
        "X-Xet-Token-Expiration": str(expires),
    }
    value = {"casUrl": emulator.url, "exp": expires, "accessToken": f"{kind}-token"}
    return as_json(value, headers=headers)


@_needs("read")
def tree(emulator: HubEmulator, request: Request, bucket_id: str, prefix: str) -> Response:
    """All files below a folder, a page at a time; folders instead of what is in them with recursive=false."""
    seen_ms = emulator.now_ms() - emulator.list_lag_seconds * 1000
    folder = f"{prefix.strip('/')}/" if prefix else ""
    entries = {path: _entry(path, f) for path, f in emulator.buckets[bucket_id].files(folder, seen_ms).items()}
    if request.query.get("recursive", "true").lower() == "false":
        entries = _one_level(folder, entries)
    cursor = request.query.get("cursor", "")
    page = [entries[path] for path in sorted(entries) if path > cursor]
    headers = {}
    if len(page) > emulator.page_nitems:
        page = page[: emulator.page_nitems]
        query = urlencode({**request.query, "cursor": page[-1]["path"]})
        headers["Link"] = f'<{emulator.url}{request.path}?{query}>; rel="next"'
    return as_json(page, headers=headers)


def _one_level(folder: str, entries: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    found = {}
    for path, entry in entries.items():
        head, slash, _ = path.removeprefix(folder).partition("/")
        name = folder + head
        found[name] = {"type": "directory", "path": name, "uploadedAt": entry["uploadedAt"]} if slash else entry
    return found


def _entry(path: str, file: FileEntry) -> dict[str, object]:
    times = {"mtime": iso(file.mtime_ms), "uploadedAt": iso(file.uploaded_ms)}
    return {"type": "file", "path": path, "size": file.size, "xetHash": file.xet_hash} | times


@_needs("read")
def paths_info(emulator: HubEmulator, request: Request, bucket_id: str) -> Response:
    seen_ms = emulator.now_ms() - emulator.info_lag_seconds * 1000
    bucket = emulator.buckets[bucket_id]
    found = [(path, bucket.find(path, seen_ms)) for path in json.loads(request.body)["paths"]]
    return as_json([_entry(path, file) for path, file in found if file is not None])


@_needs("write")
def batch(emulator: HubEmulator, request: Request, bucket_id: str) -> Response:
    """Operation by operation, not a transaction: what fails is listed, the rest stands."""
    operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    failed = []
    for operation in operations:
        problem = _apply(emulator, emulator.buckets[bucket_id], operation)
        if problem:
            failed.append({"path": operation["path"], "error": problem})
    done = len(operations) - len(failed)
    report = {"success": not failed, "processed": len(operations), "succeeded": done, "failed": failed}
    return as_json(report, status=200 if done or not operations else 422)


def _apply(emulator: HubEmulator, bucket: Bucket, operation: dict[str, object]) -> str | None:
    path = str(operation["path"])
    if emulator.takes_failure(path):
        return "Internal error"
    if operation["type"] == "deleteFile":
        return None if bucket.remove(path, emulator.now_ms()) else "File not found"
    xet_hash = str(operation["xetHash"])
    nbytes = emulator.content.nbytes_of(xet_hash)
    if not is_valid_path(path):
        return "Invalid path"
    if nbytes is None:
        return "Xet hash not found"
    now = emulator.now_ms()
    bucket.write(path, FileEntry(xet_hash, nbytes, float(str(operation.get("mtime") or now)), now))
    return None


@_needs("read")
def resolve(emulator: HubEmulator, request: Request, bucket_id: str, path: str) -> Response:
    """Where the client asks for a file's hash and its content store; plain ranged reads as well."""
    file = emulator.buckets[bucket_id].find(path)
    if file is None:
        return error(404, "Entry not found", "EntryNotFound")
    headers = {
        "X-Xet-Hash": file.xet_hash,
        "X-Linked-Size": str(file.size),
        "X-Linked-Etag": f'"{file.xet_hash}"',
        "ETag": f'"{file.xet_hash}"',
        "Accept-Ranges": "bytes",
        "Last-Modified": email.utils.formatdate(file.uploaded_ms / 1000, usegmt=True),
        "Link": f'<{emulator.url}/api/buckets/{bucket_id}/xet-read-token>; rel="xet-auth"',
    }
    if request.method == "HEAD":
        return Response(200, headers=headers | {"Content-Length": str(file.size)})
    wanted = request.byte_range(file.size) if file.size else (0, -1)
    if wanted is None:
        return error(416, "past the end")
    body = read_content(emulator, file.xet_hash, file.size)[wanted[0] : wanted[1] + 1]
    if "range" not in request.headers:
        return Response(200, body, headers)
    return Response(206, body, headers | {"Content-Range": f"bytes {wanted[0]}-{wanted[1]}/{file.size}"})


def whoami(emulator: HubEmulator, request: Request) -> Response:
    refused = refusal(emulator, request, "read")
    return refused or as_json({"type": "user", "id": "1", "name": "user", "fullname": "user", "orgs": []})


_BUCKET = r"([^/]+/[^/]+)"
ROUTES = [
    (("GET",), rf"/api/buckets/{_BUCKET}/xet-read-token", read_token),
    (("GET",), rf"/api/buckets/{_BUCKET}/xet-write-token", write_token),
    (("GET",), rf"/api/buckets/{_BUCKET}/tree(?:/(.*))?", tree),
    (("POST",), rf"/api/buckets/{_BUCKET}/paths-info", paths_info),
    (("POST",), rf"/api/buckets/{_BUCKET}/batch", batch),
    (("POST",), r"/api/buckets/([^/]+)/([^/]+)", create),
    (("GET",), rf"/api/buckets/{_BUCKET}", info),
    (("DELETE",), rf"/api/buckets/{_BUCKET}", delete),
    (("GET", "HEAD"), rf"/buckets/{_BUCKET}/resolve/(.+)", resolve),
    (("GET",), r"/api/whoami-v2", whoami),
]
