"""Stop signals that every process of a run answers at the same step."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import Self

from muse.errors import MuseError

HINT = b"\nstopping: this step is finished and saved; Ctrl-C once more ends at once, unsaved\n"


class StopSignal:
    """Within the block SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (a cluster's warning) set a flag
    instead of ending the process. A second Ctrl-C ends it at once.
    """

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
    )

    def __init__(self, accelerator: Any) -> None:
        self.accelerator, self._heard, self._group = accelerator, False, None
        self._before: dict[int, Any] = {}
        self._interrupted = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True
        if number != signal.SIGINT:
            return
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        if self.accelerator.is_main_process:
            os.write(2, HINT)  # a handler may come in the middle of a log line: not by `log`

    def __enter__(self) -> Self:
        if self.accelerator.num_processes > 1:
            self._group = _host_group()
        try:
            self._before = {number: signal.signal(number, self._hear) for number in self.SIGNALS}
        except ValueError:  # not the main thread: the caller handles signals
            self._before = {}
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether any process heard a signal: the same answer on all of them."""
        if self._group is None:
            return self._heard
        flag = torch.tensor(float(self._heard))
        dist.all_reduce(flag, group=self._group)
        return bool(flag > 0)


def _host_group() -> Any:
    """All processes over gloo, between the hosts: to agree on a flag nobody waits for a device."""
    try:
        return dist.new_group(backend="gloo")
    except RuntimeError as error:
        chosen = os.environ.get("GLOO_SOCKET_IFNAME", "not set")
        raise MuseError(
            "the processes cannot agree on stop signals, because gloo cannot connect the machines; "
            "set GLOO_SOCKET_IFNAME on each to the network interface that reaches the others, such "
            f"as eth0 (now: {chosen}; ip addr lists them). gloo says: {str(error).splitlines()[0]}"
        ) from None
