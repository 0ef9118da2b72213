"""Declared runs: what is trained. Importing the package registers every run, in the order that `--list` shows."""

# isort: off
from experiments.runs import sizes as sizes
from experiments.runs import long_context as long_context
from experiments.runs import ladder as ladder
