"""Helpers that call the command line, and a model script for it."""

import json
from pathlib import Path

import numpy as np
import torch
from networks import Chain, images, make
from typer.testing import CliRunner

from anybit.cli.app import app

TESTS = Path(__file__).parent
SCRIPT = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import torch, networks as n
def net(): return n.make(n.Chain)
def without_gradients(): return n.make(n.WithoutGradients)
def residual(): return n.make(n.Residual)
def hollow(): return torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Flatten())
def nan():
    model = n.make(n.Chain)
    model.conv2.weight.data[0, 0, 0, 0] = float("nan")
    return model
def hot():
    model = n.make(n.Chain)
    model.bn1.weight.data.fill_(3e38)
    model.relu1 = torch.nn.Identity()
    return model
def ones(outputs, labels): return 1.0
def fewer(outputs, labels, calls=[]): calls.append(1); return -float(len(calls))
"""


FAST = ["--pipeline", "light", "--weight-bits", "4,8", "--activation-bits", "8", "--samples", "24"]


def anybit_cli(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def one_json_object(text: str) -> dict:
    value = json.loads(text)
    assert isinstance(value, dict) and text.count("\n") == 1
    return value


def write_inputs() -> None:
    """Write the model script and arrays of every kind to the working folder."""
    Path("m.py").write_text(SCRIPT)
    x = images(24).numpy()
    with torch.no_grad():
        y = make(Chain)(images(24)).argmax(1).numpy()
    np.savez("x.npz", x=x, y=y)
    np.savez("unlabelled.npz", x=x)
    np.savez("empty.npz", x=x[:0])
    np.savez("one.npz", x=x[:1])
    np.savez("wide.npz", x=np.zeros((24, 4, 8, 8), np.float32), y=y)
    np.savez("vectors.npz", x=np.zeros((24, 4), np.float32))
    np.savez("nan.npz", x=np.where(np.arange(24)[:, None, None, None] == 9, np.nan, x).astype(np.float32))
    np.savez("labels.npz", x=x, y=y + 100)
