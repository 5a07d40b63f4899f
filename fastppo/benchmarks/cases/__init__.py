"""The cases: every module here defines `BENCHMARKS`."""
