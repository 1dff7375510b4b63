"""The configuration: where values come from, and what is said of wrong ones."""

from pathlib import Path

import pytest

from backends.protocol import join_address, split_address
from gateway.cli.table import BEGIN, END, settings_table
from gateway.settings import ConfigError, api_keys, is_loopback, load

ROOT = Path(__file__).parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "baton.toml"
    path.write_text(text)
    return path


def complaints(**arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(**arguments)  # type: ignore[arg-type]
    return str(caught.value)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "[gateway]\nport = 1\nmax_n = 5\nkeep_alive_seconds = 7\n")
    environ = {"BATON__GATEWAY__PORT": "2", "BATON__GATEWAY__MAX_N": "6", "PATH": "/bin"}
    config = load(path, environ=environ, flags={"gateway.port": 3})
    assert config.gateway.port == 3
    assert config.gateway.max_n == 6
    assert config.gateway.keep_alive_seconds == 7
    assert config.gateway.host == "127.0.0.1"


def test_every_mistake_is_named_by_path_and_origin(tmp_path: Path) -> None:
    path = write(
        tmp_path, "[gateway]\nport = 'x'\n[gatewy]\nhost = 'a'\n[workers.w]\ncpus = [-1]\n"
    )
    text = complaints(path=path, environ={"BATON__QUEUE__MAX_WAITING": "many"})
    assert f"gateway.port ({path}): Expected `int`, got `str`" in text
    assert f"gatewy ({path}): there is no such setting" in text
    assert "queue.max_waiting (BATON__QUEUE__MAX_WAITING): Expected `int`, got `str`" in text
    assert f"workers.w.role ({path}): is required" in text
    assert f"workers.w.cpus ({path}): Expected `int` >= 0 - at `[0]`" in text


@pytest.mark.parametrize(
    ("name", "value", "path"),
    [
        ("BATON__GATEWAY__PORT", "70000", "gateway.port"),
        ("BATON__NOTHING", "1", "nothing"),
        ("BATON__GATEWAY", "1", "gateway"),
        ("BATON__GATEWAY__PORT__DEEP", "1", "gateway.port"),
        ("BATON__DEPLOYMENT", "no spaces", "deployment"),
        ("BATON__WORKERS__DECODE__ROLE", "both of them", "workers.decode.role"),
        ("BATON__WORKERS__DECODE__LISTEN", "127.0.0.1:1", "workers.decode.listen"),
        ("BATON__WORKERS__DECODE__CPUS", "4000", "workers.decode.cpus"),
        ("BATON__WORKERS__DECODE__TRANSPORTS", "shm,pigeon", "workers.decode.transports"),
        ("BATON__WORKERS__DECODE__TRANSPORTS", "[]", "workers.decode.transports"),
        ("BATON__REDIS__URL", "http://x", "redis.url"),
        ("BATON__GATEWAY__API_KEYS", "tenant:", "gateway.api_keys"),
        ("BATON__GATEWAY__API_KEYS_FILE", "/nowhere", "gateway.api_keys_file"),
    ],
)
def test_a_wrong_variable_is_an_error_at_its_path(name: str, value: str, path: str) -> None:
    assert complaints(environ={name: value}).startswith(path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    assert "baton.toml" in complaints(path=write(tmp_path, "[gateway"), environ={})
    assert "absent.toml" in complaints(path=tmp_path / "absent.toml", environ={})
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    assert "bytes.toml" in complaints(path=tmp_path / "bytes.toml", environ={})


def test_variables_are_read_as_the_setting_is_declared() -> None:
    config = load(
        environ={
            "BATON__SECURITY__SECRET": "123",
            "BATON__GATEWAY__API_KEYS": "a:k1, k2",
            "BATON__WORKERS__DECODE__CPUS": "0",
            "BATON__WORKERS__DECODE__OPTIONS__BLOCK_TOKENS": "8",
            "BATON__WORKERS__DECODE__OPTIONS__DTYPE": "float32",
        }
    )
    assert config.security.secret == "123"
    assert api_keys(config) == {"k1": "a", "k2": "default"}
    assert config.workers["decode"].cpus == (0,)
    assert config.workers["decode"].options["block_tokens"] == 8
    assert config.workers["decode"].options["dtype"] == "float32"


def test_workers_in_a_file_replace_the_default_ones(tmp_path: Path) -> None:
    assert set(load(environ={}).workers) == {"prefill", "decode"}
    config = load(write(tmp_path, "[workers.all]\nrole = 'both'\n"), environ={})
    assert set(config.workers) == {"all"}


def test_the_default_workers_have_unlike_layouts() -> None:
    workers = load(environ={}).workers
    for option in ("axes", "block_tokens"):
        assert workers["prefill"].options[option] != workers["decode"].options[option]


def test_the_default_workers_are_the_better_engine_for_each_phase() -> None:
    workers = load(environ={}).workers
    assert (workers["prefill"].backend, workers["decode"].backend) == ("emulation", "onnxruntime")
    assert all(worker.unlike_weights for worker in workers.values())


def test_beyond_loopback_workers_need_a_secret() -> None:
    worker = {"BATON__WORKERS__DECODE__LISTEN": "tcp:10.0.0.1:7000"}
    assert "security.secret" in complaints(environ=worker)
    assert load(environ={**worker, "BATON__SECURITY__SECRET": "s"})
    assert "data_host" in complaints(environ={"BATON__WORKERS__DECODE__DATA_HOST": "10.0.0.1"})


def test_tls_needs_all_of_its_files() -> None:
    some = {"BATON__SECURITY__TLS_CERTIFICATE": "/c.pem", "BATON__SECURITY__TLS_KEY": "/k.pem"}
    assert "security.tls_authority" in complaints(environ=some)
    assert load(environ={**some, "BATON__SECURITY__TLS_AUTHORITY": "/a.pem"})


def test_a_worker_on_every_address_says_under_which_it_is_reached() -> None:
    everywhere = {
        "BATON__WORKERS__DECODE__LISTEN": "tcp:0.0.0.0:7000",
        "BATON__SECURITY__SECRET": "s",
    }
    assert complaints(environ=everywhere).startswith("workers.decode.data_host")
    assert load(environ={**everywhere, "BATON__WORKERS__DECODE__DATA_HOST": "decode-1"})


def test_keys_come_from_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# people\nann:k1\n\nk2  # a machine\n")
    config = load(environ={"BATON__GATEWAY__API_KEYS_FILE": str(path)})
    assert api_keys(config) == {"k1": "ann", "k2": "default"}


def test_addresses_are_told_apart() -> None:
    assert split_address("unix:/run/a.sock") == ("unix", "/run/a.sock", 0)
    assert split_address("tcp:[::1]:70") == ("tcp", "::1", 70)
    for wrong in ("unix:relative", "tcp:host", "tcp::1", "host:1", "tcp:h:99999", "tcp:h:x", ""):
        with pytest.raises(ValueError, match="expected unix:"):
            split_address(wrong)
    assert join_address("::1", 70) == join_address("[::1]", 70) == "tcp:[::1]:70"
    assert join_address("h", 70) == "tcp:h:70"
    assert is_loopback("127.0.0.5")
    assert is_loopback("::1")
    assert not is_loopback("example.org")


def test_the_readme_shows_every_setting_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text()
    shown = readme.split(BEGIN)[1].split(END)[0].strip()
    assert shown == settings_table(), "run `baton settings` and paste its output"
