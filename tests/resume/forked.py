"""Runs programs in processes forked from this one, which has imported what they import.

    python tests/resume/forked.py

Reads requests from stdin, a line of JSON each: `code` and `arguments` as of `python -c`, `cwd`, and
`output`, the files for stdout and stderr. Prints the status of each, as subprocess has it. The
imports take ten times as long as such a program.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
import warnings
from typing import Any

from fastppo.rewards.pool import CAN_FORK

IMPORTED = (
    *("fastppo.cli.train", "fastppo.ppo.trainer", "matplotlib.backends.backend_agg", "tyro"),
    *("matplotlib.figure", "transformers.models.llama.modeling_llama"),
    "transformers.tokenization_utils_tokenizers",
)
WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def become(request: dict[str, Any]) -> types.CodeType:
    """In a forked process: the program of a request, before its first line."""
    for descriptor, path in enumerate((os.devnull, *request["output"])):
        opened = os.open(path, WRITE if descriptor else os.O_RDONLY, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(request["cwd"])
    sys.argv = ["-c", *request["arguments"]]
    sys.path[0] = ""
    return compile(request["code"], "<string>", "exec")


def serve() -> types.CodeType | None:
    """Returns the program in every forked process, and None at the end of the requests."""
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if not CAN_FORK:
            command = [sys.executable, "-c", request["code"], *request["arguments"]]
            with open(request["output"][0], "w") as out, open(request["output"][1], "w") as err:
                done = subprocess.run(command, cwd=request["cwd"], stdout=out, stderr=err)
            print(done.returncode, flush=True)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of idle threads
            process = os.fork()
        if process == 0:
            return become(request)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    return None


if __name__ == "__main__":
    program = serve()
    if program is not None:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(program, vars(sys.modules["__main__"]))
