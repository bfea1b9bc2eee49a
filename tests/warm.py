"""Forks of a process that has imported torch, in place of processes that import it.

    python tests/warm.py FOLDER

A node starts `flwr-clientapp` for each message: seconds of a processor for imports.
FOLDER gets a `flwr-clientapp` that asks this process for a fork. The fork has its
environment, folder, output and process group, and runs the next `flwr-clientapp` on the
PATH. What is not imported here, such as our own package, it imports itself.
"""

import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import sys
from pathlib import Path

NAME = "flwr-clientapp"
IMPORTED = ("flwr.supernode.cli", "pydantic", "torch._dynamo", "torch_pruning")

ASK = """#!/usr/bin/env -S python3 -S
import json, os, socket, sys
told = [sys.argv, dict(os.environ), os.getcwd(), os.getpgrp()]
os.chdir(os.path.dirname(sys.argv[0]))
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asked:
    asked.connect("socket")
    socket.send_fds(asked, [json.dumps(told).encode()], [0, 1, 2])
    asked.recv(1)  # until the fork is killed with our process group
"""


def main(folder: Path) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork has one thread"
    folder.mkdir()
    os.chdir(folder)  # a socket's path must be short
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind("socket")
        server.listen(100)
        new = Path("new")
        new.write_text(ASK)
        new.chmod(0o755)
        new.rename(NAME)  # until now the PATH has the usual one
        while True:
            asked, _ = server.accept()
            told, files, *_ = socket.recv_fds(asked, 1 << 20, 3)
            if not os.fork():
                break
            for file in files:
                os.close(file)
            asked.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    become(*json.loads(told), asked, files)


def become(
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    group: int,
    asked: socket.socket,
    files: list[int],
) -> None:
    """Be the program that somebody asked for."""
    os.setpgid(0, group)
    asked.send(b"1")
    asked.close()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    here, name = os.path.split(arguments[0])
    folders = environment["PATH"].split(os.pathsep)
    path = os.pathsep.join(each for each in folders if each != here)
    program = shutil.which(name, path=path)
    assert program
    sys.argv, sys.path[0] = [program, *arguments[1:]], str(Path(program).parent)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
