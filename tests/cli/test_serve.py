"""`weightline serve transformers`: its options and its refusals. tests/serving/http/test_server.py runs the server."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.chains import commit_state, random_state
from weightline.chain import open_chain
from weightline.cli.main import app, main
from weightline.errors import InputError, SignatureError
from weightline.format.signature import generate_key
from weightline.serving.engines.sglang import version_folder
from weightline.serving.http import server
from weightline.serving.http.server import ServerSettings
from weightline.serving.replica.following import Following

CHAIN = "memory://nobody/toy"


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """The command takes signals over for its process, which is the tests' here."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[ServerSettings]:
    """What the server is started with; it is not started."""
    settings: list[ServerSettings] = []
    monkeypatch.setattr(server, "serve", settings.append)
    return settings


def _serve(*options: str) -> None:
    argv = ["serve", "transformers", "--follow", CHAIN, *options]
    assert CliRunner().invoke(app, argv, catch_exceptions=False).exit_code == 0


def test_without_options_it_follows_every_version_on_loopback(
    told: list[ServerSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _serve()
    (settings,) = told
    assert settings.host == "127.0.0.1"
    assert settings == ServerSettings(CHAIN, tmp_path / ".weightline" / "replica-0", follow_seconds=5.0)
    assert settings.following == Following(5.0, None)


def test_every_option_reaches_the_server(told: list[ServerSettings], tmp_path: Path) -> None:
    _serve(
        "--state-dir", str(tmp_path), "--name", "r-7", "--host", "::1", "--port", "0", "--every", "0.1",
        "--ref", "serving", "--drain", "3", "--lease", "4", "--advertise", "http://gpu-7:8000",
        "--require-signature", "key.pub", "--device", "cpu",
    )  # fmt: skip
    assert told == [
        ServerSettings(
            CHAIN, tmp_path, name="r-7", host="::1", port=0, follow_seconds=0.1, follow_ref="serving", device="cpu",
            drain_seconds=3.0, lease_seconds=4.0, advertise_url="http://gpu-7:8000", trusted_keys=Path("key.pub"),
        )
    ]  # fmt: skip


def test_a_replica_can_be_told_to_move_only_when_told(told: list[ServerSettings], tmp_path: Path) -> None:
    _serve("--state-dir", str(tmp_path), "--every", "0")
    assert told == [replace(ServerSettings(CHAIN, tmp_path), follow_seconds=None)]
    assert told[0].following is None
    with pytest.raises(InputError, match="never reads the ref 'serving'"):
        _serve("--state-dir", str(tmp_path), "--every", "0", "--ref", "serving")


def test_what_is_wrong_is_one_line_before_the_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["weightline", "serve", "transformers", "--follow", CHAIN, "--state-dir", str(tmp_path), "--port", "0"]
    monkeypatch.setattr(sys, "argv", [*argv, "--require-signature", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error (input): no key can be read")
    assert not (tmp_path / "address.json").exists()


@pytest.mark.process
def test_what_is_wrong_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from weightline.cli.main import main\n"
        "try: main()\n"
        "finally: print('HEAVY', sorted({'torch', 'numba', 'transformers'} & set(sys.modules)))"
    )
    argv = ["serve", "transformers", "--follow", CHAIN, "--state-dir", str(tmp_path), "--port", "0"]
    argv += ["--require-signature", str(tmp_path / "nothing")]
    told = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout) == (1, "HEAVY []\n")
    assert "no key can be read" in told.stderr


@pytest.mark.parametrize("wrong", [("--port", "99999"), ("--port", "-1"), ("--every", "-1"), ("--drain", "-1")])
def test_a_number_out_of_range_is_wrong_usage(told: list[ServerSettings], wrong: tuple[str, str]) -> None:
    ended = CliRunner().invoke(app, ["serve", "transformers", "--follow", CHAIN, *wrong])
    assert (ended.exit_code, told) == (2, [])
    assert wrong[0] in ended.stderr


def test_sglangs_folder_is_published_up_to_the_tip_of_a_chain_that_somebody_vouches_for(tmp_path: Path) -> None:
    chain = open_chain((tmp_path / "bucket").as_uri())
    for _ in range(2):
        commit_state(chain, random_state(0))
    argv = ["serve", "sglang", "--follow", chain.url, "--out", str(tmp_path / "out"), "--every", "0"]
    generate_key(tmp_path / "key")
    with pytest.raises(SignatureError):
        CliRunner().invoke(app, [*argv, "--require-signature", str(tmp_path / "key.pub")], catch_exceptions=False)
    assert not list((tmp_path / "out").glob("weight_v*"))
    told = CliRunner().invoke(app, [*argv, "--full"], catch_exceptions=False)
    assert told.stdout.split() == [str(version_folder(tmp_path / "out", version)) for version in range(2)]
    assert CliRunner().invoke(app, ["serve", "sglang", *argv[2:-1], "-1"]).exit_code == 2
