"""A Postgres server of a test's own: Debian's programs, on loopback, with a password."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import closing
from pathlib import Path

import psycopg2
import psycopg2.extensions

_DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
_INITDB = shutil.which("initdb") or (str(_DEBIAN[-1]) if _DEBIAN else None)
#: The folder of Postgres's programs, where it is installed.
BINARIES = Path(_INITDB).parent if _INITDB else None

#: The owner of the database, and the password, which nothing may show.
USER, PASSWORD = "dagster", "canary-postgres-7d1e44b2c9"


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Postgres:
    """The server, from ``with`` to its end. Its disk is not waited for: this is no crash test."""

    def __init__(self):
        # Not pytest's folder: the user that Postgres runs as may not enter that.
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self.port = free_port()
        #: What tells programs where it is.
        self.variables = {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": USER,
            "PGPASSWORD": PASSWORD,
            "PGDATABASE": "postgres",
        }
        password = self.folder / "password"
        password.write_text(PASSWORD)
        if os.getuid() == 0:
            for path in (self.folder, password):
                shutil.chown(path, "postgres", "postgres")
        self._run(
            *("initdb", "--username", USER, "--pwfile", str(password)),
            *("--auth", "scram-sha-256", "--no-sync", "--pgdata", str(self.folder / "data")),
        )

    def __enter__(self) -> Postgres:
        self.start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        """Start it and wait until it answers."""
        settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",
        }
        options = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
        self._ctl("start", "--log", str(self.folder / "log"), "--options", options)

    def stop(self) -> None:
        """End it at once: what is connected is cut off, what is not committed is not kept."""
        self._ctl("stop", "--mode", "fast")

    def connect(self) -> psycopg2.extensions.connection:
        """A connection of its owner's."""
        return psycopg2.connect(
            host="127.0.0.1", port=self.port, user=USER, password=PASSWORD, dbname="postgres"
        )

    def cut_off(self, run_id: str) -> None:
        """End it in the middle of the statement by which a Dagster run tells of its next event."""
        telling = f"INSERT INTO event_logs%{run_id}%"
        with closing(self.connect()) as db, db.cursor() as cursor:
            cursor.execute("LOCK TABLE event_logs IN SHARE MODE")  # who writes waits
            deadline, waiting = time.monotonic() + 60, 0
            while not waiting:
                assert time.monotonic() < deadline, f"run {run_id} tells of nothing"
                time.sleep(0.1)
                cursor.execute("SELECT pg_stat_clear_snapshot()")
                cursor.execute(
                    "SELECT count(*) FROM pg_stat_activity "
                    "WHERE wait_event_type = 'Lock' AND query LIKE %s",
                    [telling],
                )
                (waiting,) = cursor.fetchone()
            self.stop()

    def _ctl(self, *arguments: str) -> None:
        self._run("pg_ctl", *arguments, "--wait", "--silent", "--pgdata", str(self.folder / "data"))

    def _run(self, program: str, *arguments: str) -> None:
        """One of its programs, which refuse to be root's."""
        assert BINARIES is not None, "Postgres is not installed"
        drop = ("runuser", "--user", "postgres", "--") if os.getuid() == 0 else ()
        done = subprocess.run(
            [*drop, str(BINARIES / program), *arguments],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,  # the server would keep a pipe open
            stderr=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{program} {arguments} ended with {done.returncode}"
