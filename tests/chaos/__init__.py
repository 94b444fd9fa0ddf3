"""Chaos: every kind of process of a real run is killed at random moments, and the outcome compared.

`make chaos` runs it in full (`PYTHONPATH=tests python -m chaos --help`), test_chaos.py in a short form.
"""
