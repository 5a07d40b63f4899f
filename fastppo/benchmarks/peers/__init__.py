"""Other projects' implementations, called through their public functions, one project a module.

A module has `NEEDS`, the packages it takes to run, and functions on the shapes of
`fastppo.benchmarks.head`. Nothing of a project is imported before one of them is called.
"""
