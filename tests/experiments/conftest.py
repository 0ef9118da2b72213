"""What several tests of studies share."""

import pytest

from experiments.studies.allocation import ALLOCATION
from experiments.studies.declared import by_series


@pytest.fixture(scope="module")
def points():
    """The allocation study's at its tiny scale, of the smaller budget."""
    return by_series(ALLOCATION.at(ALLOCATION.scales["tiny"]()))["C"]
