"""Measures the wall time of the dashboard on a long chain, with a real server process and a real browser.

    python -m benchmarks.dashboard_bench [--versions 10000] [--tensors 310]

Writes a chain of manifests and records (no payloads), starts `weightline dashboard` on it, and opens the page twice:
when the server has read nothing, and when it has read everything. Needs playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from playwright.sync_api import Page, sync_playwright

from weightline.chain import Chain
from weightline.chain.write.commit import new_commit_id
from weightline.chain.write.version import NewVersion, put_contents
from weightline.format import keys
from weightline.format.manifest import FORMAT_2, Header, PayloadRef
from weightline.format.state_digests import StateDigests
from weightline.format.tensor_layout import Layout
from weightline.store.local import LocalStore
from weightline.types import TensorSpec

STAGES = ("sft", "dpo", "grpo")
_DRAWN = "#version-{tip}[aria-selected=true]"
_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
            "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm", "self_attn.q_norm",
            "self_attn.k_norm")  # fmt: skip


def write_chain(root: Path, num_versions: int, num_tensors: int) -> None:
    """Writes headers and records as the engine does, without fsync. Every version changes four tensors."""
    names = [f"model.layers.{n // len(_MODULES)}.{_MODULES[n % len(_MODULES)]}.weight" for n in range(num_tensors)]
    digests = StateDigests.zeros(Layout.of(TensorSpec(name, "BF16", (1024, 1024)) for name in names))
    chain, base = Chain(LocalStore(root)), None
    num_elements = num_tensors << 20
    for version in range(num_versions):
        is_anchor = version == 0
        commit_id = new_commit_id()
        payload = PayloadRef(key=keys.payload(version, commit_id, 0), nbytes=3_000_000, sha256="0" * 64, rank=0)
        facts = Header(
            format=FORMAT_2, version=version, base_version=None if is_anchor else version - 1,
            kind="anchor" if is_anchor else "delta",
            commit_id=commit_id, created_at=_clock(version), run_id="bench", global_step=10 * version,
            stage=STAGES[min(2, 3 * version // num_versions)], coding="gap", world_size=1, is_milestone=is_anchor,
            num_changed=num_elements if is_anchor else num_elements // (80 + version % 40), num_elements=num_elements,
            payload_nbytes=payload.nbytes, full_nbytes=2 * num_elements, payloads=(payload,),
            metrics={f"metric_{n}": 1.0 / (1 + n + version) for n in range(20)} | {"loss": 10.0 / (10 + version)},
        )  # fmt: skip
        digests = digests.copy()
        for at in range(4 * version, 4 * version + 4):
            digests.digests_T[at % num_tensors] += 1
        base = put_contents(chain, NewVersion(facts, digests), base)
        chain.keep_header(base)
        _write(root / base.key, base.to_bytes())
        evaluation = {"status": "done", "score": 1 - 1 / (1 + version / 500), "num_problems": 400}
        served = {"status": "done", "served_at": _clock(version, 2.5), "pause_seconds": 0.02}
        for kind, name, record in (("evaluations", "arithmetic", evaluation), ("refreshes", "replica-0", served)):
            _write(root / keys.record(kind, version, name), json.dumps(record).encode())


def _clock(version: int, after_seconds: float = 0.0) -> str:
    moment = time.gmtime(1_767_225_600 + 60 * version + after_seconds)
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", moment)


def _write(path: Path, body: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)


@contextmanager
def dashboard(root: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Yields URL and process of a server in a process of its own, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "weightline.cli.main", "dashboard", root.as_uri(), "--port", str(port)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        while not _answers(url):
            time.sleep(0.02)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/", trust_env=False).is_success
    except httpx.TransportError:
        return False


def look(page: Page, url: str, tip: int) -> str:
    """Opens the page, and times the first paint, the graph with its newest version, and the whole page."""
    started = time.perf_counter()
    page.goto(url)
    page.wait_for_selector(_DRAWN.format(tip=tip))
    graph = time.perf_counter() - started
    page.wait_for_selector("#charts canvas")
    page.wait_for_selector("#panel h2")
    whole = time.perf_counter() - started
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1e3
    return f"first paint {paint:.2f} s, graph {graph:.2f} s, graph, curves and version {whole:.2f} s"


def step(page: Page, key: str, version: int) -> float:
    """Returns the seconds from a key press to the version's panel."""
    started = time.perf_counter()
    page.locator("#rail").press(key)
    page.wait_for_function("v => document.querySelector('#panel h2')?.textContent === v", arg=f"v{version}")
    return time.perf_counter() - started


def wait_until_read(url: str) -> None:
    """Waits until the server has read all manifests and records: nothing is pending and nothing changed for 5 s."""
    seen, since = None, time.monotonic()
    while seen is None or seen["num_pending"] or time.monotonic() - since < 5:
        now = httpx.get(f"{url}/api/chains", trust_env=False, timeout=60).json()["chains"][0]
        if seen is None or now["generation"] != seen["generation"]:
            seen, since = now, time.monotonic()
        time.sleep(0.5)


def measure(root: Path, num_versions: int, executable: str) -> None:
    """Measures everything and prints the results."""
    tip = num_versions - 1
    with sync_playwright() as playwright, dashboard(root) as (url, process):
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        started = time.perf_counter()
        print(f"nothing read yet  {look(browser.new_page(), url, tip)}", flush=True)
        wait_until_read(url)
        print(
            f"everything read   after {time.perf_counter() - started - 5:.1f} s, {process.memory_info().rss >> 20} MiB"
        )
        page = browser.new_page()
        print(f"everything read   {look(page, url, tip)}")
        steps = [step(page, "ArrowLeft", tip - n) for n in range(1, 11)]
        jumps = [step(page, "Home", 0), step(page, "End", tip)]
        print(f"a key             next version {sorted(steps)[5]:.3f} s (median of 10), other end {max(jumps):.3f} s")
        before = process.cpu_times()
        time.sleep(10)
        after = process.cpu_times()
        print(f"idle              {(after.user + after.system - before.user - before.system) * 10:.1f} % of a core")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--tensors", type=int, default=310)
    parser.add_argument("--chain", type=Path, help="a folder to keep the chain in, or one that has it")
    args = parser.parse_args()
    executable = shutil.which("chromium")
    if executable is None:
        parser.error("no chromium on this machine")
    with tempfile.TemporaryDirectory(prefix="weightline-dashboard-") as folder:
        root = args.chain or Path(folder) / "long-chain"
        if not root.exists():
            write_chain(root, args.versions, args.tensors)
        print(f"{args.versions} versions of {args.tensors} tensors")
        measure(root, args.versions, executable)


if __name__ == "__main__":
    main()
