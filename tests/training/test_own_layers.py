"""An attention and readers from outside the package, two as docs/extending.md shows them: from settings to export."""

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tyro

from engram_jax import counts
from engram_jax.config import AttentionConfig, ConfigError, EngramConfig, MoEConfig, RunConfig, replace
from engram_jax.inference.cache import new_cache, rollback
from engram_jax.inference.decode import extend
from engram_jax.interop.runs import export_run, import_run
from engram_jax.layers.reader import newest
from engram_jax.layers.short_conv import shift
from engram_jax.registries import ATTENTION, READERS
from engram_jax.runs.load import load_run
from engram_jax.runs.parts import assemble
from engram_jax.runs.settings import read_config
from engram_jax.sharding import placed, spec
from engram_jax.training.loop import train
from engram_jax.training.metrics import read_metrics

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
SPARE, PLACES = 4, 32


def file_of(name):
    """The module in the page's Python file that defines class `name`."""
    files = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (text,) = [text for text in files if re.search(rf"^class {name}\b", text, re.MULTILINE)]
    module = ModuleType(f"file_of_{name}")
    exec(compile(text, f"{PAGE.name}:{name}", "exec"), module.__dict__)
    return module


def echo():
    """A reader with gates that looks one position back: the page's, with both added."""
    page = file_of("RowSumVariant")

    class Echo(page.RowSum):
        """gate (v_t + v_{t-1}), v being the projected rows."""

        has_gates = True

        def __call__(self, x_BTMD, rows_BTHe, segment_ids_BT=None):
            return self.read(x_BTMD, rows_BTHe, segment_ids_BT)[0]

        def read(self, x_BTMD, rows_BTHe, segment_ids_BT=None):
            value_BTD = self.value(x_BTMD, rows_BTHe)
            before_BTD = shift(value_BTD, 1)
            if segment_ids_BT is not None:
                before_BTD = before_BTD * (shift(segment_ids_BT, 1) == segment_ids_BT)[..., None]
            gate_BTM = jax.nn.sigmoid(jnp.mean(x_BTMD, axis=-1))
            return gate_BTM[..., None] * (value_BTD + before_BTD)[:, :, None], gate_BTM

        def value(self, x_BTMD, rows_BTHe):
            return super().__call__(x_BTMD, rows_BTHe)[:, :, 0]

        @staticmethod
        def new_cache(config, batch, spare):
            shape = (batch, 1 + spare, config.hidden_size)
            return jnp.zeros(shape, config.dtype, out_sharding=spec("batch", None, None))

        def extend(self, x_BTMD, rows_BTHe, count_B, cache):
            value_BTD = placed(self.value(x_BTMD, rows_BTHe), "batch", None, None)
            before_BTD = jnp.concatenate([cache[:, -1:], value_BTD[:, :-1]], axis=1)
            gate_BTM = jax.nn.sigmoid(jnp.mean(x_BTMD, axis=-1))
            sum_BTD = placed(value_BTD + before_BTD, "batch", "seq", None)
            update_BTMD = gate_BTM[..., None] * sum_BTD[:, :, None]
            return update_BTMD, newest(cache, value_BTD, count_B)

    class EchoVariant(page.RowSumVariant):
        def reach(self, engram):
            return 1

        def cache_bytes(self, config, spare):
            return (1 + spare) * config.hidden_size * config.itemsize

        def layer(self, engram):
            return Echo

    return EchoVariant()


VARIANTS = {
    "multi_query": (ATTENTION, lambda: file_of("MultiQuery").VARIANT),
    "row_sum": (READERS, lambda: file_of("RowSum").VARIANT),
    "echo": (READERS, echo),
}
SETTINGS = {
    "multi_query": {"model__attention__kind": "multi_query", "train__mesh_context": 2},
    "row_sum": {"model__engram__engram_variant": "row_sum", "model__engram__engram_kernel_size": 0},
    "echo": {"model__engram__engram_variant": "echo", "model__engram__engram_kernel_size": 0},
}


@pytest.fixture
def registered():
    """`registered(name)`: registers one of VARIANTS for one test."""
    added = []

    def register(name):
        registry, make = VARIANTS[name]
        registry.register(name, make())
        added.append((registry, name))
        return registry[name]

    yield register
    for registry, name in added:
        registry.unregister(name)


@pytest.fixture
def own_run(config):
    """Three steps, with monitors, of a model with two streams and without experts."""
    changes = {"model__moe": MoEConfig(), "model__hc_mult": 2, "model__hc_sinkhorn_iters": 2}
    return replace(config, **changes, train__steps=3, train__eval_every=0, memory__monitor_every=1)


def leaves_by_path(params):
    return {".".join(k.key for k in path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}


@partial(jax.jit, static_argnums=0)
def step(parts, state, tokens_BT, count_B, cache):
    model = parts.model(state.params, state.buffers)
    hidden, cache = extend(model, parts.store, state.memory, state.step, tokens_BT, count_B, cache)
    return model.logits(hidden), cache


@partial(jax.jit, static_argnums=0)
def whole(parts, state, tokens_BT):
    model = parts.model(state.params, state.buffers)
    rows = parts.store.fetch(state.memory, parts.store.plan(tokens_BT), state.step)
    return model.logits(model.hidden(tokens_BT, rows)[0])


def check_decoding(parts, state, rng):
    """Ragged chunks, tokens taken back, then single tokens, against whole sequences."""
    tokens_BT = rng.integers(0, 300, (2, 20)).astype(np.int32)
    length_B, logits_BT = np.zeros(2, int), np.zeros((2, 20, 300), np.float32)
    with jax.set_mesh(parts.mesh):
        cache = new_cache(parts.config.model, 2, PLACES, SPARE)
        expected = np.asarray(whole(parts, state, tokens_BT))
        for back_B, width, count_B in (
            ((0, 0), 7, (7, 4)),
            ((0, 0), 7, (6, 7)),
            ((3, 4), 1, (1, 1)),
            ((0, 0), 1, (0, 1)),
        ):
            cache = jax.jit(rollback)(cache, jnp.array(back_B, jnp.int32))
            length_B -= back_B
            new_BT = rng.integers(0, 300, (2, width)).astype(np.int32)  # what follows the counted ones is padding
            for b, count in enumerate(count_B):
                new_BT[b, :count] = tokens_BT[b, length_B[b] : length_B[b] + count]
            found_BT, cache = step(parts, state, new_BT, np.array(count_B, np.int32), cache)
            for b, count in enumerate(count_B):
                logits_BT[b, length_B[b] : length_B[b] + count] = np.asarray(found_BT)[b, :count]
            length_B += count_B
        for b, length in enumerate(length_B):
            np.testing.assert_allclose(logits_BT[b, :length], expected[b, :length], rtol=1e-5, atol=1e-5)
        one = jax.eval_shape(partial(new_cache, parts.config.model, 1, PLACES, SPARE))
    assert counts.cache_bytes(parts.config.model, PLACES, SPARE) == sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(one)
    )


def check_counts(parts, state):
    built, counted = Counter(), Counter()
    for path, leaf in leaves_by_path(state.params).items():
        built[path.rsplit(".")[-1]] += leaf.size
    for leaf in counts.leaves(parts.config.model):
        counted[leaf.name] += leaf.size
    assert counted == built


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_decodes_and_goes_through_a_file(name, own_run, registered, rng, tmp_path):
    variant = registered(name)
    config = replace(own_run, **SETTINGS[name])
    train(config, tmp_path / "run", log=lambda line: None)
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 3 and np.isfinite(losses).all()

    state, parts = load_run(tmp_path / "run", log=lambda line: None)
    with jax.set_mesh(parts.mesh):
        begun = leaves_by_path(parts.init_state().params)
    trained = leaves_by_path(state.params)
    prefix = "blocks.00-01.attn." if name == "multi_query" else "engram.0."
    own = {path for path in trained if path.startswith(prefix)}
    assert own == {prefix + weight.name for weight in variant.weights(config.model)}
    for path in own:
        assert np.abs(trained[path] - begun[path]).max() > 1e-4, path
    check_decoding(parts, state, rng)
    check_counts(parts, state)

    export_run(tmp_path / "run", tmp_path / "hf", log=lambda line: None)
    tensors = {}
    for file in (tmp_path / "hf").glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    if name == "multi_query":
        bias = trained["blocks.00-01.attn.q_bias_nh"]
        np.testing.assert_array_equal(tensors["model.layers.1.self_attn.q_proj.bias"], bias[1].ravel())
        assert json.loads((tmp_path / "hf" / "config.json").read_text())["rope_interleave"] is False
    else:
        row_hed = trained["engram.0.row_hed"]
        np.testing.assert_array_equal(tensors["model.layers.0.engram.row_proj.weight"], row_hed.transpose(0, 2, 1))
    import_run(tmp_path / "hf", tmp_path / "back", log=lambda line: None)
    back, _ = load_run(tmp_path / "back", log=lambda line: None)
    jax.tree.map(np.testing.assert_array_equal, back.params, state.params)

    gates = [key for line in read_metrics(tmp_path / "run") for key in line if key.startswith("memory/gate_0/")]
    assert bool(gates) == (name != "row_sum") == config.model.engram.has_gates
    registry, _ = VARIANTS[name]
    registry.unregister(name)  # as in a process that does not know it
    with pytest.raises(ConfigError, match=rf"='{name}' is not one of '"):
        read_config(tmp_path / "run")
    registry.register(name, variant)


def test_operations_and_bytes_by_hand(own_run, registered):
    registered("multi_query")
    config = replace(own_run, **SETTINGS["multi_query"]).model
    a, base = config.attention, replace(config, attention__kind="gqa", attention__num_key_value_heads=1)
    # the biases are added, not multiplied: the same products as grouped-query attention with one group
    assert counts.flops_per_token(config, 32) == counts.flops_per_token(base, 32)
    assert counts.cache_bytes(config, 64) == counts.cache_bytes(base, 64)
    found = counts.backbone_parameters(config).groups["attention"]
    assert found - counts.backbone_parameters(base).groups["attention"] == 2 * a.num_attention_heads * a.qk_head_dim


def test_a_mesh_that_cannot_cut_a_variant_is_refused(own_run, tokenizer, registered):
    registered("multi_query")
    attention = replace(own_run, **SETTINGS["multi_query"] | {"train__mesh_tensor": 2, "train__mesh_context": 1})
    with pytest.raises(ConfigError, match=r"mesh_tensor=2: .*kind='multi_query' cannot be cut over tensor\. Set"):
        assemble(attention, tokenizer)
    changes = {"engram__engram_kernel_size": 3, "engram__engram_max_ngram_size": 9}
    reader = replace(own_run, **{f"model__{name}": value for name, value in changes.items()}, train__mesh_context=2)
    with pytest.raises(ConfigError, match=r"mesh_context=2 leaves pieces shorter than the 18 positions that"):
        assemble(reader, tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engram_kernel_size": 4}, r"engram_kernel_size=4 .*'row_sum': set engram_kernel_size=0\."),
        ({"engram_without": ("gate",)}, r"engram_without=\('gate',\) with engram_variant='row_sum', which has no gate"),
        ({"engram_amplification": 2.0}, r"engram_amplification=2\.0 .*set engram_amplification=1\.0\."),
    ],
)
def test_a_setting_that_a_reader_does_not_use_is_refused(registered, change, message):
    registered("row_sum")
    with pytest.raises(ConfigError, match=message):
        EngramConfig(**{"engram_variant": "row_sum", "engram_kernel_size": 0} | change)


def test_names_are_listed_and_the_nearest_is_named(registered, capsys):
    registered("multi_query"), registered("row_sum")
    with pytest.raises(SystemExit):
        tyro.cli(RunConfig, args=["--help"])
    text = re.sub(r"\s", "", capsys.readouterr().out)
    assert "{mla,gqa,multi_query}" in text and "over_encoding,row_sum}" in text
    given = ["--model.attention.kind", "multi_query"]
    assert tyro.cli(RunConfig, args=given).model.attention.kind == "multi_query"
    with pytest.raises(ConfigError, match=r"kind='multi_qery' .*'multi_query'; the nearest is 'multi_query'\."):
        AttentionConfig(kind="multi_qery")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no reader 'rowsum'; the nearest is 'row_sum'"):
        READERS["rowsum"]
    with pytest.raises(ConfigError, match=r"there is a kind of attention 'mla' already"):
        ATTENTION.register("mla", ATTENTION["gqa"])
