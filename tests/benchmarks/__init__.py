"""Timed comparisons with simpler programs. `python -m tests.benchmarks --help`; pytest runs none of them."""
