"""A test that hangs fails, and says where."""

import signal
import subprocess
import sys
import time

import pytest

HANGS = """
import subprocess, sys, threading
import pytest
from tests.limits import limited

def stuck():
    child = subprocess.Popen([sys.executable, "-c", "print(flush=True); import time; time.sleep(600)"], stdout=-1)
    child.stdout.readline()
    try:
        lock = threading.Lock()
        with lock, lock:
            pass
    finally:
        assert child.wait() == -9

class Deleted:
    def __del__(self):
        stuck()

for what in (stuck, Deleted):
    with limited(50), pytest.raises(pytest.fail.Exception, match="no end after 0.5 seconds"), limited(0.5):
        what()
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs SIGALRM")
def test_what_hangs_is_ended_with_its_processes() -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "in stuck" in done.stderr
    assert time.monotonic() - start < 50
