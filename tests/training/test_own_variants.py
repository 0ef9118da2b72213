"""A row optimizer and placements from the files that docs/extending.md shows, registered and trained with."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from jax.sharding import NamedSharding

from engram_jax.config import (
    ConfigError,
    MemoryConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    from_dict,
    replace,
    to_dict,
)
from engram_jax.memory.placements import DevicePlacement, in_program_placements
from engram_jax.registries import PLACEMENTS, ROW_OPTIMIZERS
from engram_jax.runs.load import for_use
from engram_jax.runs.parts import assemble
from engram_jax.runs.settings import read_config
from engram_jax.sharding import spec
from engram_jax.training.stepper import Stepper

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
LAYER, STEPS, DEVICES = "0", 3, 2


def example(name):
    """The text of the page's Python file that defines class `name`."""
    files = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (found,) = [text for text in files if re.search(rf"^class {name}\b", text, re.MULTILINE)]
    return found


def class_of(name):
    """Class `name` of the page, as if its file were imported."""
    module = ModuleType(f"example_of_{name}")
    exec(compile(example(name), f"{PAGE.name}:{name}", "exec"), module.__dict__)
    return getattr(module, name)


@pytest.fixture
def registered():
    """`registered(registry, name, variant)`: registers it for one test."""
    added = []

    def register(registry, name, variant):
        assert registry.register(name, variant) is variant
        added.append((registry, name))
        return variant

    yield register
    for registry, name in added:
        if name in registry:
            registry.unregister(name)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """`installed(group, name, class_name)`: a package that has the page's file, found by its entry point alone."""

    def install(group, name, class_name):
        (tmp_path / "their_package.py").write_text(example(class_name))
        about = tmp_path / "their_package-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[engram_jax.{group}]\n{name} = their_package:{class_name}\n")
        monkeypatch.syspath_prepend(tmp_path)
        for registry in (PLACEMENTS, ROW_OPTIMIZERS):
            monkeypatch.setattr(registry, "_entries", dict(registry._entries))
            registry.__dict__.pop("_installed", None)  # as in a new process

    yield install
    for registry in (PLACEMENTS, ROW_OPTIMIZERS):
        registry.__dict__.pop("_installed", None)
    sys.modules.pop("their_package", None)


@pytest.fixture
def own_run(config):
    """A run of one block without experts, whose gradients are not clipped."""
    model = replace(config.model, num_hidden_layers=1, moe=MoEConfig())
    return replace(config, model=model, optimizer__clip_norm=0.0)


def train(config, tokenizer, batches, look=lambda parts, state, batch: None):
    """Metrics of each step, what `look` returned before each step, and every row after the last step."""
    parts = assemble(config, tokenizer, jax.devices()[:DEVICES])
    with jax.set_mesh(parts.mesh):
        sharding = NamedSharding(parts.mesh, spec("batch", "seq"))
        batches = [jax.device_put(batch, sharding) for batch in batches]
        state, history, seen = parts.init_state(), [], []
        with Stepper(parts, iter(batches), lambda line: None) as stepper:
            for step in range(STEPS):
                stepper.settle()
                seen.append(look(parts, state, batches[step]))
                state, metrics = stepper(state, step)
                history.append(jax.device_get(metrics))
            stepper.settle()
        rows = parts.store.materialize(state.memory, STEPS)[LAYER]
        return history, seen, np.asarray(rows)


def row_gradients(parts, state, batch):
    """Every row, and the gradient of the loss by every row: float32 [num_rows, head_dim] both."""
    store = parts.store

    @jax.jit
    def by_lookup(state, batch):
        plan = store.plan(batch["tokens"], batch["segment_ids"])

        def loss(rows):
            model = parts.model(state.params, state.buffers)
            hidden_BTD, _ = model.hidden(batch["tokens"], rows, batch["segment_ids"], batch["positions"])
            return jnp.sum(model.token_losses(hidden_BTD, batch["targets"])) / jnp.sum(batch["targets"] >= 0)

        return plan[LAYER].ids_BTH, jax.grad(loss)(store.fetch(state.memory, plan, state.step))[LAYER]

    ids_BTH, grads_BTHD = jax.device_get(by_lookup(state, batch))
    grads_ND = np.zeros((store.num_rows(LAYER), grads_BTHD.shape[-1]), np.float32)
    np.add.at(grads_ND, ids_BTH, grads_BTHD)
    return np.asarray(store.materialize(state.memory, state.step)[LAYER]), grads_ND


def test_a_row_optimizer_trains_as_its_formula_says(own_run, tokenizer, make_batch, rng, registered, tmp_path):
    registered(ROW_OPTIMIZERS, "momentum", class_of("Momentum"))
    config = replace(own_run, optimizer__table_optimizer="momentum", optimizer__table_lr_multiplier=50.0)
    batches = [make_batch(rng) for _ in range(STEPS + 3)]
    _, seen, last = train(config, tokenizer, batches, row_gradients)

    rates = 50.0 * 1e-2 * np.minimum(np.arange(1, STEPS + 1) / 2, 1)  # two steps of warm-up
    expected, m = seen[0][0].astype(np.float64), 0.0
    for (rows, grads), rate in zip(seen, rates, strict=True):
        np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-7)
        touched = np.any(grads != 0, axis=1)[:, None]  # a row rests, and so does its momentum, unless it is looked up
        m = np.where(touched, config.optimizer.adam_b1 * m + grads, m)
        expected = expected - np.where(touched, rate * m, 0)
    np.testing.assert_allclose(last, expected, rtol=1e-5, atol=1e-7)
    moved = np.abs(last - seen[0][0]).max(axis=1)
    assert np.median(moved[moved > 0]) > 1e-4 and 0 < np.mean(moved > 0) < 1

    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert read_config(tmp_path) == config == from_dict(RunConfig, to_dict(config))
    ROW_OPTIMIZERS.unregister("momentum")  # as in a process that does not know it
    with pytest.raises(ConfigError, match=r"table_optimizer='momentum' is not one of 'catch_up_adam', "):
        read_config(tmp_path)


@pytest.mark.parametrize(("name", "like"), [("HalvesPlacement", "device"), ("DictPlacement", "numpy")])
def test_a_placement_changes_no_bit(name, like, own_run, tokenizer, make_batch, rng, installed, tmp_path):
    """`like`: a built-in placement whose training step is the same program."""
    installed("placements", "theirs", name)
    batches = [make_batch(rng) for _ in range(STEPS + 3)]
    expected, _, expected_rows = train(replace(own_run, memory__placement=like), tokenizer, batches)
    config = replace(own_run, memory__placement="theirs")
    history, _, rows = train(config, tokenizer, batches)
    np.testing.assert_equal(history, expected)
    assert len({metrics["loss"].item() for metrics in history}) == STEPS
    np.testing.assert_array_equal(rows, expected_rows)

    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert read_config(tmp_path) == config
    served = {"HalvesPlacement": "theirs", "DictPlacement": "host"}[name]
    assert for_use(config).memory.placement == served and served in in_program_placements()
    if name == "DictPlacement":
        with pytest.raises(ConfigError, match=r"placement=theirs: .* Choose one of device, host, tiered\."):
            for_use(config, placement="theirs")


def test_settings_and_help_list_a_registered_name(registered, capsys):
    registered(ROW_OPTIMIZERS, "own_rule", class_of("Momentum"))
    registered(PLACEMENTS, "own_memory", DevicePlacement)
    assert get_type_hints(OptimizerConfig)["table_optimizer"].__args__ == tuple(ROW_OPTIMIZERS)
    assert get_type_hints(MemoryConfig)["placement"].__args__[-1] == "own_memory"
    with pytest.raises(SystemExit):
        tyro.cli(RunConfig, args=["--help"])
    text = capsys.readouterr().out
    assert "own_rule" in text and "own_memory" in text
    assert tyro.cli(RunConfig, args=["--memory.placement", "own_memory"]).memory.placement == "own_memory"


def test_a_name_that_is_taken_or_unknown_is_refused(registered):
    own = registered(PLACEMENTS, "own_memory", class_of("HalvesPlacement"))
    assert PLACEMENTS.register("own_memory", own) is own
    for name in ("device", "own_memory"):
        with pytest.raises(ConfigError, match=f"there is a placement '{name}' already"):
            PLACEMENTS.register(name, class_of("DictPlacement"))
    with pytest.raises(ConfigError, match=r"no placement 'own_memry'; the nearest is 'own_memory'"):
        PLACEMENTS["own_memry"]
    with pytest.raises(ConfigError, match=r"no row optimizer 'lazy_adm'; the nearest is 'lazy_adam'"):
        ROW_OPTIMIZERS["lazy_adm"]
    with pytest.raises(ConfigError, match=r"placement='own_memry' is not one of 'device', .*'own_memory'"):
        MemoryConfig(placement="own_memry")


def test_a_package_that_cannot_be_imported_is_named(installed):
    installed("row_optimizers", "theirs", "Momentum")
    assert "theirs" in ROW_OPTIMIZERS and OptimizerConfig(table_optimizer="theirs").table_optimizer == "theirs"
    Path(sys.path[0], "their_package.py").write_text("import no_such_package\n")
    with pytest.raises(ConfigError, match=r"the row optimizer 'theirs' \(their_package:Momentum\) cannot be imported"):
        ROW_OPTIMIZERS["theirs"]


@pytest.mark.parametrize("placement", ["device", "host", "tiered"])
def test_a_folder_means_nothing_to_placements_without_files(placement, own_run, tokenizer):
    config = replace(own_run, memory__placement=placement, memory__mmap_dir="somewhere")
    with pytest.raises(ConfigError, match=rf"memory\.mmap_dir='somewhere': memory\.placement={placement} keeps no"):
        assemble(config, tokenizer)
