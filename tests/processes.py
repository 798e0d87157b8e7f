"""Other processes in tests: none has a limit in seconds, which a machine with other work would run into.

A hang is what the caller's own limit is for. A process that ends badly ends those that may wait for it.
"""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

FOREVER = 10**6  # seconds, eleven days: where an interface insists on a number


def side_by_side(commands: list[list[str]]) -> list[str]:
    """What each printed to stdout. All must end well: as soon as one does not, the others are killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(c, env=environment, stdout=-1, stderr=-1, text=True) for c in commands]

    def outputs_of(process: subprocess.Popen) -> tuple[str, str]:
        outputs = process.communicate()
        if process.returncode:
            for other in running:
                other.kill()
        return outputs

    with ThreadPoolExecutor(len(running)) as threads:
        outputs = list(threads.map(outputs_of, running))
    assert not any(process.returncode for process in running), outputs
    return [out for out, _ in outputs]
