"""Stop signals that every process of a run answers at the same step."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist


class StopSignal:
    """Within the block SIGTERM and SIGUSR1 (a cluster's warning) set a flag instead of ending the
    process.
    """

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)
    )

    def __init__(self, accelerator: Any) -> None:
        self.accelerator, self._heard, self._group = accelerator, False, None
        self._before: dict[int, Any] = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True

    def __enter__(self) -> Self:
        try:
            self._before = {number: signal.signal(number, self._hear) for number in self.SIGNALS}
        except ValueError:  # not the main thread: the caller handles signals
            self._before = {}
        if self.accelerator.num_processes > 1:
            self._group = dist.new_group(
                backend="gloo"
            )  # between the hosts: nobody waits for a device
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
