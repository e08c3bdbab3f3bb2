"""Signals in the loader's worker processes.

Ctrl-C, `kill` on a process group and a cluster's schedulers signal the workers together with their
training process. That one goes on reading until it has saved, so the workers must live on.
"""

import os
import signal
import threading


def outlive_stop_signals(worker: int) -> None:
    """A `worker_init_fn`: what ends a run does not end its workers; their parent's SIGTERM does.

    A program that a worker starts (`pipe:`) takes over what is ignored and blocked here.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, Windows: who sent a signal cannot be asked
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_by_parent, args=(os.getppid(),), daemon=True).start()


def _end_by_parent(parent: int) -> None:
    """Take each SIGTERM; end on the one with which torch ends a worker that is stuck in a read."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
