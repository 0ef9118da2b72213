"""What several tests of studies share."""

import pytest

from experiments.studies.engine.declared import by_series
from experiments.studies.trained.allocation import ALLOCATION


@pytest.fixture(scope="module")
def points():
    """The allocation study's at its tiny scale, of the smaller budget."""
    return by_series(ALLOCATION.at(ALLOCATION.scales["tiny"]()))["C"]
