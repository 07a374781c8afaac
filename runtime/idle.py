"""Threads that a run leaves spinning, and how a measurement keeps out of their way."""

from __future__ import annotations

import time

_STEP_SECONDS = 4e-3
_SPINNING_SHARE = 0.2
_LONGEST_SECONDS = 1.0


def wait_until_idle() -> None:
    """Return when the threads of this process have stopped spinning, after a second at most.

    ONNX Runtime's threads spin for about 30 ms after a run and would take the processor from what
    is measured next, in this process or another. The session option against it
    (session.force_spinning_stop) is no way out: the next run has to wake the threads first, which
    made decoding with the reference model 1.2 to 1.35 times slower on 2 threads of a Zen 5 (32
    steps of about 1 ms, interleaved), and left single small operators to one thread altogether.
    """
    deadline = time.perf_counter() + _LONGEST_SECONDS
    while time.perf_counter() < deadline:
        start, busy = time.perf_counter(), time.process_time()
        time.sleep(_STEP_SECONDS)
        waited = time.perf_counter() - start
        if time.process_time() - busy < _SPINNING_SHARE * waited:
            return
