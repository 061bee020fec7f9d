"""Run a training in several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_processes(count: int, folder: Path, tmp_path: Path, worker: str) -> None:
    script = tmp_path / "worker.py"
    script.write_text(worker)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)], env={**os.environ, **environment, "RANK": str(r), "LOCAL_RANK": str(r)}
        )
        for r in range(count)
    ]
    assert [process.wait(timeout=240) for process in started] == [0] * count
