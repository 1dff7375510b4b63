"""The files in `deploy/` name settings that exist and say what they seem to say."""

import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from gateway.settings import load

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
EXAMPLE = DEPLOY / "baton.example.toml"
COMPOSE = YAML(typ="safe").load(DEPLOY / "compose.yaml")
BATON_SERVICES = [name for name in COMPOSE["services"] if name != "redis"]


def environment_of(service):
    """What compose would set for a service, with every variable replaced."""
    variables = COMPOSE["services"][service]["environment"]
    return {key: re.sub(r"\$\{[^}]+\}", "s3cret", str(value)) for key, value in variables.items()}


def healthcheck(target):
    return subprocess.run(
        [sys.executable, DEPLOY / "healthcheck.py"],
        env={**os.environ, "BATON_HEALTH": target},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_the_example_configuration_is_valid_by_itself():
    config = load(EXAMPLE, environ={})
    assert {worker.role for worker in config.workers.values()} == {"prefill", "decode"}


@pytest.mark.parametrize("service", BATON_SERVICES)
def test_every_service_starts_with_settings_that_baton_accepts(service, tmp_path):
    environ = environment_of(service)
    if "BATON__GATEWAY__API_KEYS_FILE" in environ:
        keys = tmp_path / "api_keys"
        keys.write_text("me:key\n")
        environ["BATON__GATEWAY__API_KEYS_FILE"] = str(keys)
    config = load(EXAMPLE, environ=environ)
    assert config.security.secret == "s3cret"
    assert config.redis.url == "redis://:s3cret@redis:6379/0"


@pytest.mark.parametrize("worker", ["prefill", "decode"])
def test_workers_are_reached_where_their_health_is_asked(worker):
    environ = environment_of(worker)
    config = load(EXAMPLE, environ=environ)
    assert config.workers[worker].data_host == worker
    assert config.workers[worker].listen.rpartition(":")[2] == environ["BATON_HEALTH"][-4:]


def test_only_the_gateway_is_published_and_only_on_loopback():
    published = {n: s["ports"] for n, s in COMPOSE["services"].items() if "ports" in s}
    assert list(published) == ["gateway"]
    assert all(port.startswith("127.0.0.1:") for port in published["gateway"])


def test_what_the_image_copies_is_not_ignored():
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copies = re.findall(r"^COPY (?!--from)(.+)$", (DEPLOY / "Dockerfile").read_text(), re.M)
    wanted = {word for line in copies for word in line.split()[:-1]}
    assert wanted
    assert wanted <= allowed
    assert all((ROOT / name).exists() for name in wanted)


def test_a_listening_worker_is_healthy_and_a_silent_port_is_not():
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        assert healthcheck(f"tcp:127.0.0.1:{port}").returncode == 0
    gone = healthcheck(f"tcp:127.0.0.1:{port}")
    assert gone.returncode == 1
    assert "unhealthy" in gone.stderr


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_gateway_is_healthy_when_it_says_so(status, code):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        checked = healthcheck(f"http://127.0.0.1:{server.server_port}/health/live")
        thread.join(10)
    assert checked.returncode == code


def test_a_health_address_of_another_kind_is_refused():
    assert "expected" in healthcheck("file:///etc/passwd").stderr
