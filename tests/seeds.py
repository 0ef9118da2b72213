"""The seed of the random tests: a pytest plugin.

A session draws one base seed, or takes the one of `--seed N`. The fixture `rng` is a generator seeded with the base
seed and the test's name: the same numbers alone, in any order and on any worker. A failure prints how to replay it.
"""

import secrets
import shlex
from hashlib import sha256

import numpy as np
import pytest

RANDOM = pytest.StashKey[set[str]]()
"""Names of the fixtures that have drawn numbers."""


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="base seed of the random tests; without it, each session draws a new one")


def pytest_configure(config):
    if config.option.seed is None:  # workers get their controller's options
        config.option.seed = secrets.randbits(32)


def pytest_report_header(config):
    return f"seed of random tests: {config.option.seed} (--seed {config.option.seed} replays them)"


def rng_of(request):
    """NumPy generator of the test or, in fixtures that several tests share, of the fixture that has this `request`."""
    request.config.stash.setdefault(RANDOM, set()).add(request.fixturename)
    name = f"{request.node.nodeid} {request.fixturename}"
    return np.random.default_rng([request.config.option.seed, *sha256(name.encode()).digest()])


@pytest.fixture
def rng(request):
    """NumPy generator of this test, with other numbers in every session."""
    return rng_of(request)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed and item.config.stash.get(RANDOM, set()) & set(item.fixturenames):
        replay = f"pytest {shlex.quote(item.nodeid)} --seed {item.config.option.seed}"
        report.sections.append(("random test, replay with", replay))
    return report
