"""`--help` of a run: every option once, under a heading; the flags themselves are flat."""

from __future__ import annotations

import dataclasses
import re

import pytest

from fastppo.cli.groups import MOST_USED
from fastppo.cli.main import main
from fastppo.cli.profile import ProfileConfig
from fastppo.options import Options
from fastppo.ppo.config import TrainConfig


@pytest.mark.parametrize(("command", "kind"), [("train", TrainConfig), ("profile", ProfileConfig)])
def test_every_option_is_shown_once_and_the_most_used_first(
    command: str,
    kind: type[Options],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    flags = re.findall(r"^\W{2}--([a-z][a-z0-9-]*)", text, re.M)
    shown = [flag.replace("-", "_") for flag in flags]
    assert sorted(shown) == sorted(field.name for field in dataclasses.fields(kind))
    assert tuple(shown[: len(MOST_USED)]) == MOST_USED
    titles = re.findall(r"^\W+([\w ]+) options\b", text, re.M)
    assert titles[:3] == ["most used", "run", "optim"]
    assert len(titles) == len(set(titles)) and {"KL", "policy loss"} <= set(titles)
    assert ("profile" in titles) == (command == "profile")
    assert text.count("(required)") == 3
