"""Forks of a process that has imported torch, in place of processes that import it.

    python tests/warm.py FOLDER

A node starts `flwr-clientapp` for each message: seconds of a processor for imports.
FOLDER gets programs of Flower's names that ask this process for a fork. The fork has
their environment, folder, output and process group, and runs the next program of that
name on the PATH. What is not imported here, such as our own package, it imports itself.
"""

import atexit
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import sys
from pathlib import Path

NAMES = ("flwr-clientapp", "flwr-serverapp", "flower-superexec", "flower-supernode")
IMPORTED = (
    *("flwr.supernode.cli", "flwr.superlink.cli", "flwr.supercore.cli"),
    *("pydantic", "torch._dynamo", "torch_pruning"),
)

ASK = """#!/usr/bin/env -S python3 -S
import json, os, signal, socket, sys
folder, name = os.path.split(sys.argv[0])
if os.getsid(0) == os.getpid():  # it is killed by its id, not with its group
    path = os.environ["PATH"].replace(folder + os.pathsep, "")
    os.execvpe(name, [name, *sys.argv[1:]], {**os.environ, "PATH": path})
told = [sys.argv, dict(os.environ), os.getcwd(), os.getpgrp()]
os.chdir(folder)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the fork gets it, too, and ends
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asked:
    asked.connect("socket")
    socket.send_fds(asked, [json.dumps(told).encode()], [0, 1, 2])
    sys.exit(ord(asked.recv(1) or b"\\1"))
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
        for name in NAMES:  # until now the PATH has the usual ones
            os.link(new, name)
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
    try:
        os.setpgid(0, group)
    except PermissionError:  # of another session, that of the SuperLink's SuperExec
        os.setsid()
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
    Path("/proc/self/comm").write_text(name)
    code = [1]
    atexit.register(lambda: asked.send(bytes(code)))
    try:
        runpy.run_path(program, run_name="__main__")
        code = [0]
    except SystemExit as exited:
        code = [exited.code or 0]
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
