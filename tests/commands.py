"""The command line as tests call it, and a model script for it."""

import json
from pathlib import Path

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
def twice(): return n.make(n.CalledTwice)
def shared(): return n.make(n.SharedWeight)
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
