"""Benchmarks of fastppo's ops beside other ways of doing the same: `fastppo bench`.

A case says what is computed, on which inputs, what the right answer is and what it must move and
compute; its providers are the ways of computing it. Nothing is timed before its answer is right.
"""
