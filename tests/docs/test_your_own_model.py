"""The cells of docs/your_own_model.md: four frameworks, one memory."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from markdown_pages import ROOT, blocks

from engram_jax import Engram

PAGE = ROOT / "docs" / "your_own_model.md"
LINES = {"nnx": 12, "linen": 25, "equinox": 25, "haiku": 25}


def cells(framework):
    found = [block for block in blocks(PAGE) if block.run == framework]
    assert found, f"{PAGE} has no cell for {framework}"
    return found


def executed(framework):
    """The names that the cells of a framework leave behind."""
    names: dict = {}
    for cell in cells(framework):
        exec(compile("\n" * (cell.line - 1) + cell.text, PAGE, "exec"), names)
    return names


@pytest.fixture(scope="module")
def nnx_cells():
    return executed("nnx")


@pytest.fixture(scope="module")
def new(nnx_cells):
    """The NNX cell's model before training: the parameters that all frameworks get."""
    return nnx_cells["MyModel"](nnx.Rngs(3))


@pytest.mark.parametrize("framework", LINES)
def test_a_cell_is_short(framework):
    lines = [line for line in cells(framework)[0].text.splitlines() if line.strip()]
    assert len(lines) <= LINES[framework] and max(map(len, lines)) <= 120


def test_the_readme_shows_the_first_cell():
    (shown,) = [block for block in blocks(ROOT / "README.md") if block.language == "python"]
    assert ast.dump(ast.parse(shown.text)) == ast.dump(ast.parse(cells("nnx")[0].text))


def test_the_cells_of_nnx_train(nnx_cells):
    losses, model = nnx_cells["losses"], nnx_cells["model"]
    assert len(losses) == 20 and float(losses[-1]) < float(losses[0]) - 0.5
    fresh = nnx_cells["MyModel"](nnx.Rngs(0)).engram
    tokens = nnx_cells["tokens"]
    read = rows_read(fresh, tokens)
    moved = np.any(np.asarray(model.engram.table.rows_rd[...]) != fresh.table.rows_rd[...], axis=1)
    assert np.all(moved[read]) and not np.any(np.delete(moved, read))


def test_a_table_rate_of_its_own_moves_the_rows_further(nnx_cells):
    """The third cell's groups: rows at 5e-3, as Adam's first step shows, all else at 1e-3."""
    model = nnx_cells["MyModel"](nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    optimizer = nnx.Optimizer(model, nnx_cells["rates"], wrt=nnx.Param)
    nnx_cells["train_step"](model, optimizer, nnx_cells["tokens"])
    after = nnx.to_pure_dict(nnx.state(model))
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), after, before)
    assert moved["engram"]["table"]["rows_rd"] == pytest.approx(5e-3, rel=1e-2)
    assert moved["head"]["kernel"] == pytest.approx(1e-3, rel=2e-2)


def rows_read(engram, tokens):
    return np.unique(nnx.jit(lambda engram, tokens: engram.row_ids(tokens))(engram, tokens[:, :-1]))


def arrays(new):
    return jax.tree.map(jnp.asarray, nnx.to_pure_dict(nnx.state(new)))


def linen(names, new):
    """(parameters, loss with its gradient, where the table is among them)."""
    ours = arrays(new)
    params = {"Embed_0": ours["embed"], "engram": ours["engram"], "Dense_0": ours["head"]}
    assert jax.tree.map(jnp.shape, {"params": params}) == jax.tree.map(jnp.shape, names["params"])
    return {"params": params}, names["loss_fn"], lambda p: p["params"]["engram"]["table"]["rows_rd"]


def equinox(names, new):
    import equinox as eqx

    ours, params = arrays(new), names["params"]
    embed = eqx.tree_at(lambda e: e.weight, params["embed"], ours["embed"]["embedding"])
    head = eqx.tree_at(lambda h: (h.weight, h.bias), params["head"], (ours["head"]["kernel"].T, ours["head"]["bias"]))
    engram = eqx.tree_at(lambda e: e.params, params["engram"], nnx.state(new.engram))
    return (
        {"embed": embed, "engram": engram, "head": head},
        names["loss_fn"],
        lambda p: p["engram"].params["table"]["rows_rd"][...],
    )


def haiku(names, new):
    ours = arrays(new)
    params = {
        "embed": {"embeddings": ours["embed"]["embedding"]},
        "engram/reader": ours["engram"]["reader"],
        "engram/table": ours["engram"]["table"],
        "linear": {"w": ours["head"]["kernel"], "b": ours["head"]["bias"]},
    }
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, names["params"])
    return params, names["loss_fn"], lambda p: p["engram/table"]["rows_rd"]


@pytest.mark.parametrize("framework", [linen, equinox, haiku])
def test_a_framework_computes_what_nnx_computes_and_trains_it(framework, new, nnx_cells):
    names = executed(framework.__name__)
    assert np.isfinite(float(names["loss"]))
    params, loss_fn, table = framework(names, new)
    tokens = nnx_cells["tokens"]

    def loss_of(model):
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    expected, expected_grads = nnx.jit(nnx.value_and_grad(loss_of))(new)
    step = jax.jit(lambda params: loss_fn(params, tokens))
    loss, grads = step(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(table(grads), expected_grads.engram.table.rows_rd[...], rtol=1e-4, atol=1e-8)

    optimizer, before = optax.adam(1e-3), np.asarray(table(params))

    @jax.jit
    def move(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, losses = optimizer.init(params), []
    for _ in range(10):
        loss, grads = step(params)
        params, state = move(params, state, grads)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    moved = np.any(np.asarray(table(params)) != before, axis=1)
    read = rows_read(new.engram, tokens)
    assert isinstance(new.engram, Engram) and np.all(moved[read]) and not np.any(np.delete(moved, read))
