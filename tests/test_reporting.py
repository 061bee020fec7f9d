"""The clock adds up; memory and environment are told as they are."""

import json
import subprocess
import sys
import textwrap
import time

from anybit.reporting import StageClock, environment, peak_memory


def test_the_clock_keeps_the_stages_in_order():
    clock = StageClock()
    for name in ("one", "two", "one"):
        with clock.stage(name):
            time.sleep(0.002)
    assert [stage["stage"] for stage in clock.stages] == ["one", "two", "one"]
    assert all(stage["seconds"] >= 0.002 for stage in clock.stages)


def test_a_stage_sees_the_memory_that_it_takes():
    # A process of its own: where the high-water mark cannot be reset, what ran before in this one would hide the block.
    script = """
        from anybit.reporting import StageClock
        clock = StageClock()
        with clock.stage("small"):
            pass
        with clock.stage("large"):
            block = bytearray(256 * 2**20)
        print(clock.stages[1]["peak_bytes"] - clock.stages[0]["peak_bytes"])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert 128 * 2**20 < int(done.stdout) < 512 * 2**20
    assert peak_memory() > 0


def test_the_environment_is_json_with_versions_and_machine():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] and found["machine"]["threads"] >= 1
