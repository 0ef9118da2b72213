"""What was run, as code. Importing the package registers every run; the library itself never imports it."""

from experiments import long_context_runs as long_context_runs
from experiments import runs as runs

# isort: split
# Behind them, because --list shows runs in the order of their registration.
from experiments import ladder as ladder
