import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import FAST

from anybit import __version__

COMMAND = """
import os, signal, sys
import anybit.cli.app
from anybit.__main__ import main

def swallowed():  # as extension modules do that are interrupted while they are imported
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        pass
    raise RuntimeError("half imported")

def twice():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGINT)

def failing():
    raise RuntimeError("a bug")

def leaving():
    sys.exit(2)

anybit.cli.app.main = globals()[sys.argv[1]]
main()
"""


@pytest.mark.parametrize("case", ["swallowed", "twice"])
def test_ctrl_c_exits_with_130_at_any_point(case):
    done = subprocess.run([sys.executable, "-c", COMMAND, case], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "anybit: interrupted\n")


@pytest.mark.parametrize(("case", "status"), [("failing", 1), ("leaving", 2)])
def test_other_exit_statuses_pass_through(case, status):
    done = subprocess.run([sys.executable, "-c", COMMAND, case], capture_output=True, text=True)
    assert done.returncode == status and ("a bug" in done.stderr) == (case == "failing") and "interrupted" not in done.stderr


def test_ignored_ctrl_c_stays_ignored():
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + COMMAND
    done = subprocess.run([sys.executable, "-c", ignoring, "twice"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_output_device_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "anybit", "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("anybit: the output cannot be written") and done.stderr.count("\n") == 1


def test_name_rejected_by_the_system_is_one_line():
    command = [sys.executable, "-m", "anybit", "extract", "x" * 300, "--budget", "3bit", "--output", "y"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "too long" in done.stderr and "shorter" in done.stderr and done.stderr.count("\n") == 1


def shell(command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", command, "bash", sys.executable], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&-", "<&-"])
def test_closed_stream_exits_quietly(closed, tmp_path):
    """No file opened later gets the stream's descriptor, and with it the text meant for the stream."""
    done = shell(f'cd {tmp_path}; "$1" -m anybit --version {closed}')
    assert (done.returncode, done.stderr) == (0, "") and done.stdout in ("", f"anybit {__version__}\n")
    done = shell(f'cd {tmp_path}; "$1" -m anybit explain {tmp_path} layer {closed}')
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") <= 1


def test_broken_pipe_exits_quietly():
    for verb in ("--help", "--version"):
        done = shell(f'"$1" -m anybit {verb} | true; echo ${{PIPESTATUS[0]}}')
        assert done.stderr == "" and done.stdout in ("0\n", "1\n")


HOMELESS = """
import os, pwd, sys

def unknown(*_):
    raise KeyError("no such user")

pwd.getpwuid = pwd.getpwnam = unknown
for name in [name for name in os.environ if name.startswith("XDG_") or name in ("HOME", "USER", "LOGNAME")]:
    del os.environ[name]
sys.path.insert(0, sys.argv[1])
from anybit.__main__ import main
for words in sys.argv[2:]:  # one process for all of them: to import PyTorch takes longer than they do
    sys.argv = ["anybit", *words.split()]
    try:
        main()
    except SystemExit as end:
        print("ended with", end.code or 0, file=sys.stderr)
    else:
        print("ended with 0", file=sys.stderr)
"""


def test_works_without_cache_when_there_is_no_home_folder(here):
    commands = (
        f"calibrate --model m.py:net --data x.npz --budget 5bit --output run {' '.join(FAST)}",
        "evaluate run --data x.npz --model m.py:net",
        "export run --onnx run.onnx --data x.npz --model m.py:net",
        "cache",
    )
    done = subprocess.run([sys.executable, "-c", HOMELESS, str(here), *commands], capture_output=True, text=True, timeout=100)
    assert re.findall(r"ended with (\d)", done.stderr) == ["0", "0", "0", "2"] and "Traceback" not in done.stderr
    assert "not listed as your own run" in done.stderr and "There is no cache" in done.stderr
