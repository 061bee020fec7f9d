"""Published weights that are neither stored nor reachable are refused before anything is imported."""

import socket
import subprocess
import sys

import pytest

from anybit.errors import InvalidSetting
from anybit.sources.published import check_published

VARIABLES = ("TORCH_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "http_proxy", "https_proxy")
NAMES = ["torchvision:resnet1", "timm:resnet1.a1_in1k", "hf:some/bert"]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Sources of torchvision and timm that only define a network, empty caches and no name server."""
    for library in ("torchvision", "timm"):
        (tmp_path / library / "models").mkdir(parents=True)
        (tmp_path / library / "__init__.py").write_text("raise SystemExit('imported')")
        (tmp_path / library / "models" / "resnet.py").write_text("def resnet1(pretrained=False):\n    ...\n")
        monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refuse(*where, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path


@pytest.mark.parametrize("reference", NAMES)
def test_refuses_files_that_are_neither_here_nor_to_be_had(offline, reference):
    with pytest.raises(InvalidSetting, match=r"are not in .*cache.* cannot be reached\. (Give a file with --weights=FILE|Name a folder)"):
        check_published(reference)


@pytest.mark.parametrize("reference", ["torchvision:resnet2", "timm:resnet2", "m.py:network", "torch.nn:Identity"])
def test_leaves_unknown_names_and_code_to_what_reads_them(offline, reference):
    check_published(reference)


@pytest.mark.parametrize("reference", NAMES[:2])
@pytest.mark.parametrize("weights", ["random", "mine.pt"])
def test_needs_no_published_weights_beside_others(offline, reference, weights):
    check_published(reference, weights)


@pytest.mark.parametrize(
    ("reference", "file"),
    [
        (NAMES[0], "torch/hub/checkpoints/net-0123.pth"),
        (NAMES[1], "torch/hub/checkpoints/net-0123.pth"),
        (NAMES[1], "huggingface/hub/models--timm--resnet1.a1_in1k/refs"),
        (NAMES[2], "huggingface/hub/models--some--bert/refs"),
    ],
)
def test_files_in_the_cache_are_tried(offline, reference, file):
    (offline / "cache" / file).mkdir(parents=True)
    check_published(reference)


@pytest.mark.parametrize("reference", NAMES)
def test_a_proxy_or_a_slow_name_server_is_waited_for_by_the_download(offline, monkeypatch, reference):
    with monkeypatch.context() as patch:
        patch.setenv("https_proxy", "http://proxy:3128")
        check_published(reference)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where: [])
    check_published(reference)


def test_command_line_says_so_before_torch_is_imported(offline):
    code = """
import socket, sys
sys.modules["torch"] = None
def refuse(*where, **options):
    raise socket.gaierror(-2, "Name or service not known")
socket.getaddrinfo = refuse
sys.path.insert(0, sys.argv.pop())
from anybit.__main__ import main
main()
"""
    command = [sys.executable, "-c", code, "inspect", "--model", NAMES[0], str(offline)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--weights=FILE" in done.stderr, done.stderr
