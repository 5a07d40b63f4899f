"""The command line: main.py, and one file for each command."""

from fastppo.cli.main import main

__all__ = ["main"]
