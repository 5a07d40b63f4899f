"""Processes that do one iteration each time they are told to, and take turns."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Form:
    """A process that does one iteration whenever it is told to."""

    def __init__(self, name: str, command: Sequence[str | Path], log: Path) -> None:
        self.name = name
        self.samples: list[dict[str, Any]] = []
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "TQDM_DISABLE": "1"},
            )
        self._log = log
        self.versions: dict[str, str] = {}

    def read(self) -> dict[str, Any]:
        """The next message.

        Raises:
            SystemExit: the process has ended; says what it said last.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise SystemExit(f"{self.name} ended:\n{self._log.read_text()[-3000:]}")
        message: dict[str, Any] = json.loads(line)
        return message

    def tell(self, word: str) -> None:
        """Send one line."""
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)

    def iterate(self) -> dict[str, Any]:
        """One iteration."""
        self.tell("go")
        return self.read()

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self.tell("end")
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def take_turns(runs: dict[str, list[str | Path]], folder: Path, rounds: int) -> list[Form]:
    """Iterations of several forms, one of each in turn."""
    forms: list[Form] = []
    try:
        for name, run in runs.items():
            forms.append(Form(name, run, folder / f"{name}.log"))
        for form in forms:
            form.versions = form.read()["versions"]
        for round_ in range(rounds + 1):
            for form in forms:
                sample = form.iterate()
                if round_:
                    form.samples.append(sample)
                wall, cpu = map(sum, zip(*sample["seconds"].values(), strict=True))
                print(f"round {round_}: {form.name}: {wall:.2f} s, {cpu:.2f} of CPU", flush=True)
    finally:
        for form in forms:
            form.close()
    return forms
