"""What benchmarks share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from study import narrated

from anybit.progress import tell, track


def test_events_of_a_run_are_printed_after_its_entrys_key(capsys):
    with narrated("an entry"):
        assert list(track([1], "steps")) == [1]
        tell("epoch", epoch=1, note="epoch 1/2: loss 0.5")
        tell("unit", unit="conv1")
    tell("epoch", note="after it")
    assert capsys.readouterr().out == "an entry epoch 1/2: loss 0.5\n"
