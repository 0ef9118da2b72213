"""The reader against the published code's output and gradients, against its equations written out, and its promises."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import ConfigError, EngramConfig, ModelConfig
from engram_jax.layers.engram import copysign_sqrt, gate_scores, signed_sqrt
from engram_jax.layers.reader import reader_class
from engram_jax.layers.short_conv import gated_short_conv, shift, unshift
from engram_jax.sharding import make_mesh, spec

pytestmark = pytest.mark.newest

REFERENCE = Path(__file__).parents[1] / "data" / "engram_layer_reference.npz"
IMPL = "rbg"  # its initializers compile in a fifth of the time
MOST_CUT = {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}
PRIMES = [997, 1009, 1013, 1019, 1499, 1511, 1523, 1531]  # of the reference's eight heads


def make_reader(hidden_size=32, streams=4, eps=1e-6, **engram):
    engram = {"engram_layer_ids": (0,), "engram_n_heads": 4, "engram_head_dim": 8, "engram_vocab_size": 100} | engram
    config = ModelConfig(hidden_size=hidden_size, hc_mult=streams, rms_norm_eps=eps, engram=EngramConfig(**engram))
    return jax.jit(lambda: reader_class(config.engram)(config, rngs=nnx.Rngs(jax.random.key(0, impl=IMPL))))()


@jax.jit
def call(reader, x, rows):
    return reader(x, rows)


@jax.jit
def read(reader, x, rows):
    return reader.read(x, rows)


def inputs(length, batch=1, streams=4, seed=0):
    """Streams and rows."""
    rng = np.random.default_rng(seed)
    shapes = (batch, length, streams, 32), (batch, length, 8, 8)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def reference_params(data, prefix):
    """The published module's arrays in this reader's layout."""

    def stack(name, kind="weight"):
        return np.stack([data[f"{prefix}/{name.format(i)}.{kind}"] for i in range(4)])

    def keys_then_value(kind):
        return np.concatenate([stack("key_projs.{}", kind), data[f"{prefix}/value_proj.{kind}"][None]])

    return {
        "key_value_emd": keys_then_value("weight").transpose(2, 0, 1),
        "key_value_bias_md": keys_then_value("bias"),
        "key_norm": stack("norm1.{}"),
        "query_norm": stack("norm2.{}"),
        "conv_norm": stack("short_conv.norms.{}"),
        "conv_kmd": data[f"{prefix}/short_conv.conv.weight"][:, 0].T.reshape(4, 4, 32),
    }


def test_equals_published_code_in_output_and_every_gradient():
    with jax.enable_x64(True):
        data = np.load(REFERENCE)
        reader = make_reader(eps=float(np.finfo(np.float64).eps), engram_bias=True, engram_conv_norm_eps=1e-5)
        graphdef, _ = nnx.split(reader)
        params = jax.tree.map(jnp.asarray, reference_params(data, "param"))
        hidden = jnp.asarray(data["hidden"])
        ids = data["hashes"] + np.concatenate([[0], np.cumsum(PRIMES)[:-1]])
        table = jnp.asarray(data["param/multi_head_embedding.embedding.weight"])

        def output(params, table):
            return nnx.merge(graphdef, params)(hidden, table[ids])

        def squares(params, table):
            y = output(params, table)
            return jnp.sum(y**2), y

        # The stored gradients are those of the sum of squares of the output.
        (_, y), (grads, table_grad) = jax.jit(jax.value_and_grad(squares, argnums=(0, 1), has_aux=True))(params, table)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, data["output"], rtol=0, atol=1e-9)
        expected = reference_params(data, "grad")
        assert grads.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(grads[name], expected[name], rtol=1e-9, atol=1e-9, err_msg=name)
        dense = np.zeros(table.shape)
        dense[data["grad_rows/index"]] = data["grad_rows/value"]
        np.testing.assert_allclose(table_grad, dense, rtol=1e-9, atol=1e-9)


def equations(x, rows, params, kernel, bias, dilation, eps, conv_eps, segments=None, gate=signed_sqrt):
    """Eqs. 3-6 term by term, stream by stream, position by position."""

    def norm(a, gain, eps):
        return a / jnp.sqrt(jnp.mean(a * a, -1, keepdims=True) + eps) * gain

    B, T, M, D = x.shape
    e = rows.reshape(B, T, -1)
    projected = jnp.stack([e @ params["key_value_emd"][:, m] for m in range(M + 1)], 2)
    if bias:
        projected = projected + params["key_value_bias_md"][None, None]
    value, out = projected[:, :, M], []
    for m in range(M):
        query, key = (
            norm(x[:, :, m], params["query_norm"][m], eps),
            norm(projected[:, :, m], params["key_norm"][m], eps),
        )
        score = jnp.sum(query * key, -1, keepdims=True) / D**0.5
        u = jax.nn.sigmoid(gate(score)) * value
        if not kernel:
            out.append(u)
            continue
        normed, mixed = norm(u, params["conv_norm"][m], conv_eps), []
        for t in range(T):
            total = jnp.zeros((B, D), x.dtype)
            for tap in range(kernel):
                source = t - (kernel - 1 - tap) * dilation
                if source >= 0:
                    keep = 1.0 if segments is None else (segments[:, source] == segments[:, t])[:, None]
                    total += keep * params["conv_kmd"][tap, m] * normed[:, source]
            mixed.append(total)
        out.append(u + jax.nn.silu(jnp.stack(mixed, 1)))
    return jnp.stack(out, 2)


@pytest.mark.parametrize(
    ("streams", "kernel", "bias", "variant", "segmented"),
    [
        (4, 4, False, "paper", True),
        (1, 4, True, "paper", False),
        (2, 0, False, "deepseek_v41", True),
        (3, 3, True, "qwen_ple", True),
    ],
)
def test_equals_its_equations_forward_and_gradient(streams, kernel, bias, variant, segmented):
    with jax.enable_x64(True):
        reader = make_reader(12, streams, engram_kernel_size=kernel, engram_bias=bias, engram_variant=variant)
        graphdef, params = nnx.split(reader)
        rng = np.random.default_rng(streams + kernel)
        params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), nnx.to_pure_dict(params))
        x, rows = jnp.asarray(rng.normal(size=(2, 11, streams, 12))), jnp.asarray(rng.normal(size=(2, 11, 8, 8)))
        segments = jnp.asarray(np.sort(rng.integers(1, 4, size=(2, 11)), axis=1)) if segmented else None
        weight = jnp.asarray(rng.normal(size=x.shape))
        gate = copysign_sqrt if variant == "deepseek_v41" else signed_sqrt

        def ours(params, x, rows):
            return jnp.sum(weight * nnx.merge(graphdef, params)(x, rows, segments))

        def theirs(params, x, rows):
            with jax.numpy_rank_promotion("allow"):
                return jnp.sum(weight * equations(x, rows, params, kernel, bias, 3, 1e-6, 1e-20, segments, gate))

        a, grads_a = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(params, x, rows)
        b, grads_b = jax.jit(jax.value_and_grad(theirs, argnums=(0, 1, 2)))(params, x, rows)
        np.testing.assert_allclose(a, b, rtol=1e-10)
        jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-7, atol=1e-9), grads_a, grads_b)


def random_params(reader, rng):
    graphdef, params = nnx.split(reader)
    return graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), nnx.to_pure_dict(params))


def assert_equal_forward_and_gradient(rng, ours, theirs, *arrays):
    """Sums weighted at random, so that every output counts."""
    weight = jnp.asarray(rng.normal(size=arrays[1].shape))
    every = tuple(range(len(arrays)))
    a, grads_a = jax.jit(jax.value_and_grad(lambda *args: jnp.sum(weight * ours(*args)), argnums=every))(*arrays)
    with jax.numpy_rank_promotion("allow"):
        b, grads_b = jax.jit(jax.value_and_grad(lambda *args: jnp.sum(weight * theirs(*args)), argnums=every))(*arrays)
    np.testing.assert_allclose(a, b, rtol=1e-10)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-7, atol=1e-9), grads_a, grads_b)


def test_without_gate_it_is_the_value_and_its_convolution(rng):
    with jax.enable_x64(True):
        graphdef, params = random_params(make_reader(6, 2, engram_kernel_size=2, engram_without=("gate",)), rng)
        assert {name: p.shape for name, p in params.items()} == {
            "key_value_emd": (64, 1, 6),
            "conv_norm": (2, 6),
            "conv_kmd": (2, 2, 6),
        }
        x, rows = jnp.asarray(rng.normal(size=(2, 5, 2, 6))), jnp.asarray(rng.normal(size=(2, 5, 8, 8)))

        def open_gates(params, x, rows):
            """The equations with keys that nothing depends on."""
            projections = jnp.pad(params["key_value_emd"], ((0, 0), (2, 0), (0, 0)))
            keys = {"key_value_emd": projections, "query_norm": jnp.ones((2, 6)), "key_norm": jnp.ones((2, 6))}
            return equations(x, rows, params | keys, 2, False, 3, 1e-6, 1e-20, gate=lambda s: jnp.full_like(s, jnp.inf))

        assert_equal_forward_and_gradient(
            rng, lambda params, x, rows: nnx.merge(graphdef, params)(x, rows), open_gates, params, x, rows
        )


def one_branch(params, x, rows):
    """H_post^T Engram(H_pre x) with both maps written out, and the equations for one stream."""
    port = params["port"]
    streams = x.reshape(*x.shape[:2], -1)
    normed = streams / jnp.sqrt(jnp.mean(streams**2, -1, keepdims=True) + 1e-6)
    pre = jax.nn.sigmoid(port["alpha"][0] * (normed @ port["phi_pre_cm"]) + port["bias_pre"])
    post = 2 * jax.nn.sigmoid(port["alpha"][1] * (normed @ port["phi_post_cm"]) + port["bias_post"])
    state = sum(pre[:, :, m, None] * x[:, :, m] for m in range(x.shape[2]))
    y = equations(state[:, :, None], rows, params, 2, False, 3, 1e-6, 1e-20)[:, :, 0]
    return jnp.stack([post[:, :, m, None] * y for m in range(x.shape[2])], axis=2)


def test_without_multi_branch_one_state_is_read_and_written_back(rng):
    with jax.enable_x64(True):
        graphdef, params = random_params(make_reader(6, 3, engram_kernel_size=2, engram_without=("multi_branch",)), rng)
        assert params["key_value_emd"].shape == (64, 2, 6) and params["conv_kmd"].shape == (2, 1, 6)
        x, rows = jnp.asarray(rng.normal(size=(2, 5, 3, 6))), jnp.asarray(rng.normal(size=(2, 5, 8, 8)))

        def ours(params, x, rows):
            return nnx.merge(graphdef, params)(x, rows)

        assert_equal_forward_and_gradient(rng, ours, one_branch, params, x, rows)
        assert not np.any(jax.jit(ours)(params, x, jnp.zeros_like(rows)))


def test_one_branch_starts_with_the_mean_stream_and_every_stream_alike():
    reader, (x, rows) = make_reader(engram_without=("multi_branch",)), inputs(5)
    reader.port.alpha[...] = jnp.zeros(2)  # the part that depends on the token is 1 % of it
    update, gate = read(reader, x, rows)
    plain = make_reader(streams=1)
    plain.key_value_emd[...] = reader.key_value_emd[...]
    expected, expected_gate = read(plain, x.mean(axis=2, keepdims=True), rows)
    np.testing.assert_allclose(gate, expected_gate, rtol=1e-5)
    np.testing.assert_allclose(update, np.repeat(expected, 4, axis=2), rtol=1e-5, atol=1e-7)


def test_starts_as_the_gated_value_and_zero_rows_add_exactly_nothing():
    reader, (x, rows) = make_reader(), inputs(9, batch=2)
    update, gate = map(np.asarray, read(reader, x, rows))
    value = np.asarray(rows).reshape(2, 9, -1) @ np.asarray(reader.key_value_emd[...])[:, -1]
    np.testing.assert_allclose(update, gate[..., None] * value[:, :, None], rtol=1e-5, atol=1e-7)
    assert not np.any(call(reader, x, jnp.zeros_like(rows)))


def test_gradient_is_finite_where_streams_or_rows_are_zero():
    reader, (x, rows) = make_reader(eps=1e-20), map(np.array, inputs(6))
    x[:, 2], rows[:, 3] = 0, 0
    grads = jax.jit(jax.grad(lambda x, rows: jnp.sum(reader(x, rows) ** 2), argnums=(0, 1)))(x, rows)
    assert all(np.all(np.isfinite(g)) for g in grads)


@pytest.mark.parametrize(("gate", "at_zero"), [(signed_sqrt, 0.0), (copysign_sqrt, 1e-3)])
def test_gate_root(gate, at_zero):
    s = jnp.array([0.0, 4.0, -4.0, 0.25, -1e-9])
    expected = [at_zero, 2.0, -2.0, 0.5, -1e-3]
    np.testing.assert_allclose(gate(s), expected, rtol=1e-6)
    assert np.all(np.isfinite(jax.vmap(jax.grad(gate))(s)))


def test_causal_and_inside_its_document():
    reader, (x, rows) = make_reader(), inputs(16)
    reader.conv_kmd[...] = jnp.asarray(np.random.default_rng(1).normal(size=reader.conv_kmd.shape), jnp.float32)
    segments = jnp.asarray(np.where(np.arange(16) < 7, 1, 2)[None])
    influence = jax.jit(jax.jacobian(lambda rows: jnp.sum(reader(x, rows, segments), (0, 2, 3))))(rows)
    reaches = np.abs(influence).sum((1, 3, 4)) > 0  # [to, from]
    expected = np.zeros((16, 16), bool)
    for to in range(16):
        for distance in (0, 3, 6, 9):
            source = to - distance
            expected[to, source] = source >= 0 and (source < 7) == (to < 7) if source >= 0 else expected[to, source]
    np.testing.assert_array_equal(reaches, expected)


def test_shift_moves_later_and_fills_with_zero():
    x = jnp.arange(4.0)[None]
    np.testing.assert_array_equal(shift(x, 1), [[0, 0, 1, 2]])
    np.testing.assert_array_equal(shift(x, 9), np.zeros((1, 4)))


def test_gate_scores_are_per_stream(key):
    x, k = jax.random.normal(key, (1, 2, 3, 8)), jax.random.normal(jax.random.key(1), (1, 2, 3, 8))
    scores = gate_scores(x, k, jnp.ones((3, 8)), 1e-20)
    np.testing.assert_allclose(gate_scores(x.at[:, :, 1].mul(100.0), k, jnp.ones((3, 8)), 1e-20), scores, rtol=1e-5)


def test_one_token_sequence():
    ones = (jnp.asarray(np.ones(shape, np.float32)) for shape in ((1, 1, 2), (1, 1, 4), (2, 4), (4, 2, 4)))
    y = jax.jit(lambda *args: gated_short_conv(*args, None, 3, 1e-20))(*ones)
    np.testing.assert_allclose(y, 1 + jax.nn.silu(1.0) * jnp.ones((1, 1, 2, 4)), rtol=1e-6)


def test_pieces_shorter_than_the_convolutions_reach_are_refused():
    """One neighbour is asked, and would have only a part of what is asked for."""
    mesh, cut = jax.make_mesh((4,), ("context",)), jax.P(None, "context")
    x = np.arange(64.0)[None]
    for move in (shift, unshift):
        moved = jax.shard_map(partial(move, distance=9, cut=True), mesh=mesh, in_specs=cut, out_specs=cut)
        long, short = (jax.device_put(x[:, :length], jax.NamedSharding(mesh, cut)) for length in (64, 32))
        np.testing.assert_array_equal(moved(long), move(jnp.asarray(x), 9))
        with pytest.raises(ConfigError, match="pieces of 8 positions, and the convolution looks 9 back"):
            moved(short)


@pytest.mark.parametrize("cross_documents", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_mesh_gives_the_single_device_output_and_gradients(mesh, cross_documents, rng):
    """Where the sequence is cut, the convolution's taps reach into the piece to the left, and their gradients back."""
    assert_meshed_is_single(rng, mesh, engram_cross_documents=cross_documents)


def test_a_mesh_gives_the_single_device_output_of_one_branch(rng):
    assert_meshed_is_single(rng, make_mesh(**MOST_CUT), engram_without=("multi_branch",))


@pytest.mark.slow
def test_a_mesh_gives_the_single_device_output_without_gate(rng):
    assert_meshed_is_single(rng, make_mesh(**MOST_CUT), engram_without=("gate",))


def assert_meshed_is_single(rng, mesh, **engram):
    x, rows = rng.normal(size=(8, 24, 4, 32)), rng.normal(size=(8, 24, 8, 8))
    segments = np.sort(rng.integers(1, 4, (8, 24)), axis=1).astype(np.int32)

    def make_it():
        reader = make_reader(**engram)
        reader.conv_kmd[...] = reader.conv_kmd[...] + jnp.asarray(taps[:, : reader.conv_kmd.shape[1]], jnp.float32)
        return jax.tree.map(lambda weight: weight.astype(jnp.float64), reader)

    taps = rng.normal(size=(4, 4, 32))

    @jax.jit
    def run(reader, x, rows, segments):
        def loss(reader, x, rows):
            y = reader(x, rows, segments)
            return jnp.mean(y**2), y

        (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(reader, x, rows)
        return y, nnx.to_pure_dict(nnx.state(grads[0])), grads[1:]

    with jax.enable_x64(True):
        arrays = jnp.asarray(x), jnp.asarray(rows), jnp.asarray(segments)
        expected = run(make_it(), *arrays)
        with jax.set_mesh(mesh):
            arrays = jax.device_put(arrays, jax.NamedSharding(mesh, spec("batch", "seq")))
            got = run(make_it(), *arrays)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        # The gate is steepest where a score is just above its floor of 1e-6, and rounding grows with its slope: of 150
        # draws the worst differed by 1e-11 of the largest number, at the token whose score was 8e-6, the median by
        # 3e-14. At 1e-6 that would be 2e-10.
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(a).max())
