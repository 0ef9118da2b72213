"""Seconds by cause, with a clock of the test's own."""

import jax
import jax.numpy as jnp
import pytest

from engram_jax.training.goodput import CAUSES, COMPILED, Goodput


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def seconds(goodput):
    shares = goodput.shares()
    return {cause: shares[f"goodput/{cause}"] * shares["goodput/seconds"] for cause in CAUSES}


def expected(**causes):
    return pytest.approx(dict.fromkeys(CAUSES, 0.0) | causes)


def test_every_second_has_one_cause(clock):
    goodput = Goodput(clock)
    clock.now += 3
    goodput.turn_to("steps")
    clock.now += 10
    with goodput.on("evaluation"):
        clock.now += 2
        with goodput.on("data"):
            clock.now += 1
        clock.now += 1
    clock.now += 5
    assert seconds(goodput) == expected(startup=3, steps=15, evaluation=3, data=1)
    assert goodput.shares()["goodput/seconds"] == 22
    assert goodput.line() == "Wall time: 68% steps, 14% startup, 14% evaluation, 5% data."


def test_an_error_ends_a_cause_too(clock):
    goodput = Goodput(clock)

    def fail():
        with goodput.on("saving"):
            clock.now += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now += 1
    assert seconds(goodput) == expected(saving=1, startup=1)


def test_compiling_is_taken_from_what_it_happened_in(clock):
    with Goodput(clock) as goodput:
        goodput.turn_to("steps")
        clock.now += 9
        jax.monitoring.record_event_duration_secs(COMPILED, 4.0)
        assert seconds(goodput) == expected(steps=5, compile=4)
    jax.monitoring.record_event_duration_secs(COMPILED, 4.0)
    assert seconds(goodput) == expected(steps=5, compile=4)


def test_jax_still_says_so_when_it_compiles():
    with Goodput() as goodput:
        jax.jit(lambda x: x * 3)(jnp.ones(7)).block_until_ready()
        assert seconds(goodput)["compile"] > 0


def test_steps_that_a_crash_undid_are_lost(clock):
    before = Goodput(clock)
    lines = []
    before.turn_to("steps")
    for step in range(1, 7):
        clock.now += 10
        lines += [{"step": step, "loss": 1.0, **before.shares()}, {"step": step, "validation_loss": 1.0}]
    after = Goodput(clock)
    after.resume(lines, step=4)
    clock.now += 5
    assert seconds(after) == expected(steps=40, lost=20, startup=5)
    finished = Goodput(clock)
    finished.resume(lines, step=6)
    assert seconds(finished) == expected(steps=60)
    nothing_saved = Goodput(clock)
    nothing_saved.resume(lines, step=0)
    assert seconds(nothing_saved) == expected(lost=60)
    new = Goodput(clock)
    new.resume([], step=0)
    assert seconds(new) == expected()
