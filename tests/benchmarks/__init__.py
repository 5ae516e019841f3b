"""Timed comparisons of this program with its plain peers. `python -m tests.benchmarks --help`; never part of pytest."""
