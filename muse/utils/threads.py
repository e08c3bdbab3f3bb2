"""How threads wait for each other: without spinning, unless the user has said otherwise.

OpenMP's threads spin at barriers, which is quickest where every thread has a core of its own. On a
machine that is busy with something else one of them waits for its turn while the others burn theirs
(docs/performance.md). No torch here: its OpenMP reads the environment once, when it is loaded.
"""

import os
from collections.abc import MutableMapping

# Any of these is the user's own choice: GNU's OpenMP (torch's packages for Linux) reads the first
# two, LLVM's and Intel's the first and the last.
WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
WAITING_DEFAULT = ("OMP_WAIT_POLICY", "PASSIVE")


def wait_without_spinning(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Set `OMP_WAIT_POLICY=PASSIVE` where none of `WAITING_VARIABLES` is set; whether it was.

    It has an effect on this process only before torch is imported, and on those that it starts.
    """
    if any(name in environment for name in WAITING_VARIABLES):
        return False
    name, value = WAITING_DEFAULT
    environment[name] = value
    return True
