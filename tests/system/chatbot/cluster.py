"""A PostgreSQL of the test's own: Debian's programs, a temporary folder, a free port."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.serving import free_port

PASSWORD = "plant-secret"


class Cluster:
    """Made at once, started and stopped as often as a test wants, removed at the end."""

    def __init__(self) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        assert programs, "no PostgreSQL: run .ci/system-packages first"
        self._bin = programs[-1].parent
        self.folder = Path(tempfile.mkdtemp(prefix="looktwice-postgresql-"))
        self.port = free_port()
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(self.folder, "postgres", "postgres")
        password = self.folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        data = ("-D", str(self.folder / "data"))
        self._run("initdb", *data, "-U", "plant", "-A", "scram-sha-256", f"--pwfile={password}")

    @property
    def url(self) -> str:
        return f"postgresql://plant:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-h 127.0.0.1 -p {self.port} -k {self.folder} -c fsync=off"
        log = ("-l", str(self.folder / "log"))
        self._run("pg_ctl", "start", "-D", str(self.folder / "data"), "-w", *log, "-o", options)

    def kill(self) -> None:
        """As a crash: open connections break, nothing is written any more."""
        self._run("pg_ctl", "stop", "-D", str(self.folder / "data"), "-m", "immediate")

    def restart(self) -> None:
        self.kill()
        self.start()

    def remove(self) -> None:
        if (self.folder / "data" / "postmaster.pid").exists():
            self.kill()
        shutil.rmtree(self.folder)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._bin / program), *arguments]
        if os.geteuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        with tempfile.TemporaryFile() as out:  # a pipe would stay open in the daemon
            done = subprocess.run(command, stdout=out, stderr=out, cwd="/")
            out.seek(0)
            assert done.returncode == 0, out.read().decode(errors="replace")
