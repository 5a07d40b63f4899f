"""The cases: every module here defines `CASES`."""
