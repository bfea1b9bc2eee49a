"""`autoflip run`: check everything about a run, then let `flwr run` simulate it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from autoflip_flwr import settings as presets
from autoflip_flwr.app import data
from autoflip_flwr.app.folder import check_usable, is_finished, run_directory
from autoflip_flwr.errors import needs_extra

#: How Flower begins a line of its log.
_PREFIX = "\x1b[92mINFO \x1b[0m:      "

_STARTED = re.compile(r"Successfully started run (\d+)")

#: Ray's words for processes of its own that took longer than the 15 s which it allows
#: (ray-project/ray issue 65983: fixed, whatever the machine has to do).
RAY_TIMED_OUT = "node timed out during startup"

# Exit statuses, as `timeout` and a shell give them.
_TIMED_OUT = 124
_INTERRUPTED = 130


def launch(
    preset: str, words: Sequence[str], *, output: str = "", resume: bool = False
) -> int:
    """Check a run, start it with as many nodes as it asks for, and show its log.

    `words` are overrides, `output` is the run's folder (empty: a new one in ``runs/``).
    Ctrl-C stops the run, not only the log. Returns 0 if the run has finished, 130 if it
    was stopped, else the status of `flwr run`, or 1. A setting, data or a folder that
    would end the run is an error before it begins. Where Ray has not started in time,
    as on a busy machine, the run begins again, twice at most.
    """
    given = presets.load(preset, shlex.join(words)).flat()
    for key in ("data.dir", "strategy.names"):
        if given[key]:  # the SuperLink may have another working directory
            path = str(Path(given[key]).expanduser().resolve())
            words = [*words, f"{key}={json.dumps(path, ensure_ascii=False)}"]
    settings = presets.load(preset, shlex.join(words))
    directory = run_directory(output, settings)
    check_usable(directory, resume=resume)
    with needs_extra("app", "autoflip run"):
        if find_spec("ray") is None:
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
    data.divided(settings.data, settings.strategy.min_nodes, seed=settings.seed)
    # A preset's own model is known to build; torch takes seconds to import.
    if any(word.startswith("model.") for word in words):
        from autoflip_flwr.app import build

        build.build_model(settings)
    config = {
        "preset": preset,
        "overrides": shlex.join(words),
        "output-dir": str(directory),
        "resume": resume,
    }
    with tempfile.TemporaryDirectory() as folder:
        app = str(_app(Path(folder, "app")))
        file = Path(folder) / "run.toml"
        nodes = f"num-supernodes={settings.strategy.min_nodes}"
        for then in ("beginning again", "beginning again", "close other programs"):
            toml = {k: json.dumps(v, ensure_ascii=False) for k, v in config.items()}
            file.write_text("".join(f"{k} = {v}\n" for k, v in toml.items()), "utf-8")
            status = _flwr_run(
                *(app, "--stream", "--run-config", str(file)),
                *("--federation-config", f"{nodes} client-resources-num-cpus=1"),
            )
            if status != _TIMED_OUT:
                break
            print(f"Ray did not start in 15 s: the machine is busy; {then}")
            config["resume"] = True  # the folder has the run's settings by now
    if status == _INTERRUPTED:
        print(
            "stopped; Flower ends its processes within half a minute. To go on then, "
            f"repeat the command with --output {shlex.quote(str(directory))} --resume"
        )
    return status or (0 if is_finished(directory) else 1)


def _app(copy: Path) -> Path:
    """Return what `flwr run` takes: a folder of the package, or a copy of it.

    Of a checkout `flwr run` looks at each file, also in .venv, which takes seconds.
    """
    package = Path(presets.__file__).parent
    inside = package / "flower_app"
    if inside.is_dir():
        return inside
    copy.mkdir()
    for name in ("LICENSE", "client_app.py", "pyproject.toml", "server_app.py"):
        shutil.copy(package.parent / name, copy)
    return copy


def _flwr_run(*arguments: str) -> int:
    """Show the output of `flwr run`; stop the run, too, when interrupted."""
    flwr = str(Path(sys.executable).with_name("flwr"))
    environment = {
        **os.environ,
        "PATH": f"{Path(flwr).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # take this environment
        "PYTHONUNBUFFERED": "1",
    }
    run_id, timed_out = None, False
    with subprocess.Popen(
        [flwr, "run", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # Ctrl-C is for us: `flwr run` would only detach
    ) as process:
        try:
            for line in process.stdout or ():
                started = _STARTED.search(line)
                run_id = started[1] if started else run_id
                timed_out = timed_out or RAY_TIMED_OUT in line
                print(line.removeprefix(_PREFIX), end="", flush=True)
            status = process.wait()
            return _TIMED_OUT if timed_out else status
        except KeyboardInterrupt:
            if run_id is not None:
                subprocess.run([flwr, "stop", run_id], env=environment, check=False)
            return _INTERRUPTED
        finally:
            process.terminate()
