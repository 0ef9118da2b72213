"""The page about a trace, from a program whose parts are known; and a run that writes one."""

import jax
import jax.numpy as jnp
import pytest

from engram_jax.config import replace
from engram_jax.sharding import make_mesh
from engram_jax.training.loop import train
from engram_jax.training.profile import _short, _union, _with_self_times, read_ops, summary


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Three calls of a program that multiplies in `alpha` and sums over eight devices in `beta`."""

    def program(x):
        with jax.named_scope("alpha"):
            x = jnp.tanh(x @ jnp.ones((256, 256)))
        with jax.named_scope("beta"):
            return x + jnp.sum(x)

    folder, mesh = tmp_path_factory.mktemp("trace"), make_mesh()
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((64, 256)), jax.NamedSharding(mesh, jax.P("data")))
        run = jax.jit(program)
        run(x).block_until_ready()
        with jax.profiler.trace(str(folder)):
            for _ in range(3):
                run(x).block_until_ready()
    (file,) = folder.rglob("*.xplane.pb")
    return file


def test_operations_have_devices_programs_and_scopes(trace):
    ops = [op for op in read_ops(trace) if op.module == "jit_program"]
    assert {op.device for op in ops} == {f"cpu:{i}" for i in range(8)}
    assert {op.scope for op in ops} >= {"program/alpha", "program/beta"}
    sums = [op for op in ops if op.name.startswith("all-reduce")]
    assert len(sums) == 3 * 8 and {op.scope for op in sums} == {"program/beta"}
    assert all(0 <= op.self_time <= op.end - op.start for op in ops)


def test_the_page(trace):
    page = summary(trace, steps=3, seconds=10.0)
    assert "3 steps, 3,333.3 ms each" in page and "on the 8 devices" in page
    for name in ("program/alpha", "program/beta", "jit_program: all-reduce"):
        assert f"| `{name}" in page
    rows = dict(line.strip("| ").split(" | ")[:2] for line in page.splitlines() if line.endswith("% |"))
    shares = {name: float(share.rstrip("%")) for name, share in rows.items()}
    assert shares["devices idle"] > 90  # of ten seconds
    assert 0 < shares["collectives, of operation time"] < 100


def test_time_inside_another_operation_is_not_its_own():
    events = [
        (0, 10, "d", "m", "while", ""),
        (1, 4, "d", "m", "a", ""),
        (2, 3, "d", "m", "b", ""),
        (6, 8, "d", "m", "c", ""),
    ]
    times = {op.name: op.self_time for op in _with_self_times(events[::-1])}
    assert times == {"while": 5, "a": 2, "b": 1, "c": 2}
    assert _union([(6, 8), (0, 3), (2, 4)]) == 6


@pytest.mark.parametrize(
    ("scope", "short"),
    [
        ("jit(train_step)/transpose(jvp(engram))/while/body/dot_general", "train_step/engram"),
        ("jit(_plan)/shard_map/add", "_plan"),
        ("jit(step)/jvp(ffn)/jit(_where)/btd,df->btf/select_n", "step/ffn"),
        ("add", "(no scope)"),
        ("", "(no scope)"),
    ],
)
def test_scopes_are_what_somebody_named(scope, short):
    assert _short(scope) == short


@pytest.mark.slow
def test_a_run_writes_its_profile(config, tmp_path):
    lines = []
    train(replace(config, train__eval_every=0, checkpoint__every=0), tmp_path, lines.append, profile=True)
    page = (tmp_path / "profile" / "summary.md").read_text()
    assert "# Profile\n\n5 steps, " in page and "| `train_step/engram" in page
    assert f"Profile: {tmp_path / 'profile' / 'summary.md'}." in lines
    assert "goodput/steps" in (tmp_path / "result.json").read_text()
