"""Scripts in new processes: forks of one that has imported what all of them need, but not tritern."""

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
SERVER = """
import json, os, sys, traceback
import numpy, sentence_transformers, torch, transformers
assert not any(name.startswith("tritern") for name in sys.modules)
for line in sys.stdin:
    order = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(order["folder"], name), os.O_WRONLY | os.O_CREAT), number)
    code = 0
    try:
        os.environ.update(order["environment"])
        os.chdir(order["cwd"])
        sys.path[:0], sys.argv = order["path"], ["-c", *order["arguments"]]
        exec(compile(order["code"], "<script>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


@cache
def _server():
    """One for each process of pytest; it ends when its input does."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen([sys.executable, "-c", SERVER], env=environment, cwd="/", **pipes)


def run_script(code, *arguments, cwd="/", **environment):
    """Exit status and output of a script in a process that has not imported tritern."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        order = {"code": code, "arguments": list(map(str, arguments)), "folder": folder, "cwd": str(cwd)}
        order |= {"environment": environment, "path": [str(ROOT), str(ROOT / "kernels")]}
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        output = {name: (Path(folder) / name).read_text() for name in ("stdout", "stderr")}
    return SimpleNamespace(returncode=status, **output)
