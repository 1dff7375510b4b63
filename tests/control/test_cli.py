"""The command line, as people and the supervisor call it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.cli.status import STATUS_FD


def baton(*words: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("BATON")}
    return subprocess.run(
        [sys.executable, "-m", "gateway.cli", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
        env={**clean, "BATON__DATA_DIR": str(cwd / "data"), "BATON__GATEWAY__PORT": "0", **environ},
    )


@pytest.fixture
def gguf(tmp_path: Path) -> str:
    path = tmp_path / "tiny.gguf"
    path.touch()
    return str(path)


def test_the_version_is_printed(tmp_path: Path) -> None:
    assert baton("--version", cwd=tmp_path).stdout.startswith("baton 0.")


def test_check_approves_of_a_good_configuration(tmp_path: Path, gguf: str) -> None:
    result = baton("check", "--model", gguf, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ok\n")
    assert "tiny.gguf" in result.stdout


def test_check_marks_workers_whose_timing_is_made_up(tmp_path: Path, gguf: str) -> None:
    (tmp_path / "baton.toml").write_text(
        '[workers.p]\nrole = "prefill"\n'
        '[workers.d]\nrole = "decode"\nbackend = "synthetic"\n'
        '[workers.e]\nrole = "decode"\noptions = { profile = "h200" }\n'
    )
    shown = baton("check", "--config", "baton.toml", "--model", gguf, cwd=tmp_path).stdout
    lines = dict(line.split(maxsplit=2)[1:] for line in shown.splitlines() if line[:6] == "worker")
    assert lines == {
        "p:": "prefill on emulation",
        "d:": "decode on synthetic (EMULATED)",
        "e:": "decode on emulation (EMULATED: h200)",
    }


def test_check_refuses_an_option_that_no_plug_in_has_and_says_which_is_meant(
    tmp_path: Path, gguf: str
) -> None:
    (tmp_path / "baton.toml").write_text(
        '[workers.p]\nrole = "both"\nbackend = "synthetic"\noptions = { pool_token = 512 }\n'
        '[workers.q]\nrole = "both"\nbackend = "synthetic"\noptions = { progress = 1 }\n'
    )
    result = baton("check", "--config", "baton.toml", "--model", gguf, cwd=tmp_path)
    assert result.returncode == 2
    meant, none = result.stderr.strip().splitlines()[-2:]
    assert (
        "workers.p.options: backend 'synthetic' has no option 'pool_token' "
        "(did you mean 'pool_tokens'?); it has: " in meant
    )
    assert "workers.q.options: backend 'synthetic' has no option 'progress'" in none
    assert "progress" not in none.partition("it has:")[2]


@pytest.mark.parametrize("module", ["raise OSError('no libacme.so')", "Other = dict"])
def test_check_leaves_a_plug_in_that_cannot_be_imported_here_to_the_worker(
    tmp_path: Path, gguf: str, module: str
) -> None:
    described = tmp_path / "acme-1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1\n")
    (described / "entry_points.txt").write_text("[baton.backends]\nacme = acme_decode:Acme\n")
    (tmp_path / "acme_decode.py").write_text(module)
    (tmp_path / "baton.toml").write_text(
        '[workers.p]\nrole = "both"\nbackend = "acme"\noptions = { colour = "red" }\n'
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    words = "check", "--model", gguf, "--config", "baton.toml"
    result = baton(*words, cwd=tmp_path, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr


def test_check_finds_what_only_the_machine_knows(tmp_path: Path, gguf: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = baton(
            "check",
            cwd=tmp_path,
            BATON__GATEWAY__PORT=str(taken.getsockname()[1]),
            BATON__MODEL__SOURCE="/nowhere.gguf",
            BATON__WORKERS__DECODE__BACKEND="abacus",
            BATON__WORKERS__PREFILL__TRANSPORTS="tcp",
            BATON__WORKERS__DECODE__TRANSPORTS="shm",
            BATON__REDIS__URL="redis://127.0.0.1:1",
            BATON__DATA_DIR=f"{gguf}/inside-a-file",
            BATON__SECURITY__TLS_CERTIFICATE=gguf,
            BATON__SECURITY__TLS_KEY="/no/such.key",
            BATON__SECURITY__TLS_AUTHORITY=gguf,
        )
    assert result.returncode == 2
    lines = result.stderr
    for path in (
        "gateway.port",
        "model.source",
        "workers.decode.backend",
        "workers.prefill.transports",
        "redis.url",
        "data_dir",
        "security.tls_key",
    ):
        assert f"\n{path}: " in lines, lines
    assert "emulation" in lines, "the names that would be right are listed"


def test_serve_does_not_load_a_model_when_the_port_is_taken(tmp_path: Path, gguf: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = baton("serve", "--port", port, "--model", gguf, cwd=tmp_path)
    assert result.returncode == 2
    assert "gateway.port" in result.stderr
    assert not (tmp_path / "data" / "logs").exists()


def test_parts_alone_need_a_redis(tmp_path: Path) -> None:
    for words in (("gateway",), ("worker", "--role", "decode", "--backend", "synthetic")):
        result = baton(*words, cwd=tmp_path)
        assert result.returncode == 2
        assert "redis.url" in result.stderr


def test_a_worker_must_be_described(tmp_path: Path) -> None:
    url = {"BATON__REDIS__URL": "redis://127.0.0.1:1"}
    assert "--role" in baton("worker", cwd=tmp_path, **url).stderr
    nameless = baton("worker", "--name", "w", cwd=tmp_path, **url)
    assert nameless.returncode == 2
    assert "workers.w" in nameless.stderr


def test_a_failure_is_reported_to_the_supervisor(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    environ = {**os.environ, STATUS_FD: str(writing), "BATON__GATEWAY__PORT": "x"}
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway.cli", "gateway"],
        env=environ,
        pass_fds=(writing,),
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    with os.fdopen(reading) as pipe:
        report = json.loads(pipe.read())
    assert process.wait(30) == 2
    assert report["type"] == "failure"
    assert report["message"].startswith("gateway.port")
