"""The S3 door onto the same buckets: `<url>/s3/<namespace>` is the endpoint, path style.

What the service documents: If-Match and If-None-Match are honoured on PutObject only, GetObject redirects unless the
client is one of a few, there is no user metadata, and only ListObjectsV2 lists.
"""

from __future__ import annotations

import re
from urllib.parse import quote
from xml.sax.saxutils import escape

from tests.hub_emulator import hub_routes
from tests.hub_emulator.buckets import Bucket, FileEntry
from tests.hub_emulator.content_access import write_content
from tests.hub_emulator.emulator import HubEmulator, iso
from tests.hub_emulator.wire import Request, Response

_XML = {"Content-Type": "application/xml"}
_PROXIED_AGENTS = re.compile(r"aws-cli|botocore|aws-sdk-rust", re.IGNORECASE)


def _fail(status: int, code: str) -> Response:
    return Response(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode(), _XML)


def answer(emulator: HubEmulator, request: Request, namespace: str, name: str, key: str) -> Response:
    bucket_id = f"{namespace}/{name}"
    bucket = emulator.buckets.get(bucket_id)
    if bucket is None:
        return _fail(404, "NoSuchBucket")
    if not key:
        is_list = request.method == "GET" and request.query.get("list-type") == "2"
        return _list(bucket, request, name) if is_list else _fail(501, "NotImplemented")
    if request.method == "PUT":
        return _put(emulator, bucket, request, key)
    if request.method == "DELETE":
        bucket.remove(key, emulator.now_ms())
        return Response(204)
    if bucket.find(key) is None:
        return _fail(404, "NoSuchKey")
    if request.method == "GET" and not _PROXIED_AGENTS.search(request.headers.get("user-agent", "")):
        return Response(302, headers={"Location": f"{emulator.url}/buckets/{bucket_id}/resolve/{quote(key)}"})
    return hub_routes.resolve(emulator, request, bucket_id, key)


def _put(emulator: HubEmulator, bucket: Bucket, request: Request, key: str) -> Response:
    if "uploadId" in request.query or request.query.get("partNumber"):
        return _fail(501, "NotImplemented")
    xet_hash = write_content(emulator, request.body)
    with bucket.lock:  # the precondition and the write are one step
        current = bucket.find(key)
        if request.headers.get("if-none-match") == "*" and current:
            return _fail(412, "PreconditionFailed")
        expected = request.headers.get("if-match")
        if expected and (current is None or expected != f'"{current.xet_hash}"'):
            return _fail(412, "PreconditionFailed") if current else _fail(404, "NoSuchKey")
        now = emulator.now_ms()
        bucket.write(key, FileEntry(xet_hash, len(request.body), now, now))
    return Response(200, headers={"ETag": f'"{xet_hash}"'})


def _list(bucket: Bucket, request: Request, name: str) -> Response:
    prefix, limit = request.query.get("prefix", ""), int(request.query.get("max-keys", 1000))
    after = request.query.get("continuation-token") or request.query.get("start-after") or ""
    files = {key: file for key, file in bucket.files(prefix).items() if key > after}
    delimiter = request.query.get("delimiter")
    folders = []
    if delimiter:
        inside = [key for key in files if delimiter in key[len(prefix) :]]
        folders = sorted({prefix + key[len(prefix) :].split(delimiter)[0] + delimiter for key in inside})
        files = {key: file for key, file in files.items() if key not in inside}
    page = sorted(files)[:limit]
    is_truncated = len(files) > limit
    body = [_contents(key, files[key]) for key in page]
    body += [f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders]
    body += [f"<IsTruncated>{str(is_truncated).lower()}</IsTruncated>"]
    body += [f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>"] if is_truncated else []
    head = f"<Name>{name}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
    text = f'<?xml version="1.0"?><ListBucketResult>{head}<MaxKeys>{limit}</MaxKeys>{"".join(body)}</ListBucketResult>'
    return Response(200, text.encode(), _XML)


def _contents(key: str, file: FileEntry) -> str:
    facts = f"<LastModified>{iso(file.uploaded_ms)}</LastModified><ETag>&quot;{file.xet_hash}&quot;</ETag>"
    return f"<Contents><Key>{escape(key)}</Key>{facts}<Size>{file.size}</Size></Contents>"


ROUTES = [(("GET", "PUT", "HEAD", "DELETE"), r"/s3/([^/]+)/([^/]+)(?:/(.*))?", answer)]
