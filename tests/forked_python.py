"""A Python that starts at once: a server imports the heavy packages and forks for each command.

The tests of the documents start dozens of commands, each in a shell of its own. Importing torch and
what else the package needs takes seconds; a fork has it already, and is a process of its own in
everything else: arguments, folder, environment, files.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NoReturn

PRELOADED = (
    "accelerate",
    "muse.data.dataloader",
    "muse.evaluation.command",
    "muse.inference",
    "muse.training.main",
    "muse.training.tokenizer_task",
    "transformers.models.internvl.modeling_internvl",
    "diffusers.models.autoencoders.autoencoder_dc",
)
# What a shell finds as `python`: hands its words and files to the server, ends with its exit code.
CLIENT = """#!{python} -SsE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
words = [sys.argv[1:], os.getcwd(), dict(os.environ)]
socket.send_fds(server, [b"!"], [0, 1, 2])
server.sendall(json.dumps(words).encode())
server.shutdown(socket.SHUT_WR)
sys.exit(int(server.recv(16) or 1))
"""


def start(folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    """Start a server and write `folder/python`; end it with `terminate`.

    Args:
        folder: of the program `python`.
        environment: of the server; its PYTHONPATH decides which package is imported.
    """
    address = str(folder / "socket")
    client = folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, __file__, address], env=environment, stdout=subprocess.PIPE, text=True
    )
    if server.stdout.readline() != "ready\n":
        raise RuntimeError("the server of forked_python did not start")
    return server


def serve(address: str) -> None:
    """Fork for each client, for ever; a fork runs the client's command and ends."""
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # a collection in a fork would copy all that was loaded
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the waiting processes
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            report_or_run(client)
        client.close()


def report_or_run(client: socket.socket) -> NoReturn:
    """Fork once more: one process runs the command, the other reports its exit code."""
    _, files, _, _ = socket.recv_fds(client, 1, 3)
    words, folder, environment = json.loads(b"".join(iter(lambda: client.recv(65536), b"")))
    if process := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        client.sendall(str(code if code >= 0 else 128 - code).encode())
        os._exit(0)
    client.close()
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = 0
    try:
        run(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code != code and end.code is not None:
            print(end.code, file=sys.stderr)
    except BaseException:  # a command's traceback is its own
        traceback.print_exc()
        code = 1
    # Taking down an interpreter takes seconds where so much is loaded: only what a command has
    # left to do is done.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(words: list[str]) -> None:
    """What `python WORDS` does, for the forms that the documents and the launchers use."""
    if words[:1] == ["-u"]:
        words = words[1:]
    if not words or words[0] in ("-", "-c"):
        code = words[1] if words[:1] == ["-c"] else sys.stdin.read()
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
    elif words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], ""
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
