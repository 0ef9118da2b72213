"""The runs are what they claim: matched triples, and golden configs in which a changed default shows."""

import json
import os
import re
from pathlib import Path

import pytest

from engram_jax.config import ConfigError, RunConfig, from_dict, replace, to_dict
from engram_jax.counts import flops_per_token, parameters
from engram_jax.optimizers.schedules import learning_rate
from experiments.runs.registry import RUNS, build
from experiments.runs.sizes import engram_tiny, moe_tiny
from experiments.runs.twins import active_width, dense_twin, engram_twin

GOLDEN = Path(__file__).parents[1] / "data" / "configs"
UPDATE = "UPDATE_CONFIGS=1 pytest tests/experiments/test_runs.py"


def assert_matched(dense, moe, engram):
    """Equal active parameters and FLOPs to 1 %, equal totals of the sparse two to 0.5 %."""
    sizes = [parameters(run.model) for run in (dense, moe, engram)]
    flops = [flops_per_token(run.model, run.data.seq_len) for run in (dense, moe, engram)]
    assert [size.active for size in sizes] == pytest.approx([sizes[1].active] * 3, rel=1e-2)
    assert flops == pytest.approx([flops[1]] * 3, rel=1e-2)
    assert sizes[2].total == pytest.approx(sizes[1].total, rel=5e-3)
    assert sizes[0].total < 0.5 * sizes[1].total
    assert sizes[2].memory > 0.1 * sizes[2].total and sizes[0].memory == sizes[1].memory == 0


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_triples_are_matched(size):
    dense, moe, engram = (build(f"{kind}_{size}") for kind in ("dense", "moe", "engram"))
    assert_matched(dense, moe, engram)
    for twin in (dense, engram):
        assert (twin.data, twin.optimizer, twin.train) == (moe.data, moe.optimizer, moe.train)


@pytest.mark.parametrize("changes", [{"hidden_size": 192}, {"hc_mult": 4}, {"num_hidden_layers": 6}])
def test_triples_stay_matched_at_other_sizes(changes):
    moe = replace(moe_tiny(), **{f"model__{name}": value for name, value in changes.items()})
    memory = replace(engram_tiny().model.engram, engram_vocab_size=2)
    assert_matched(dense_twin(moe), moe, engram_twin(moe, memory, n_routed_experts=20))


def test_papers_models_are_matched():
    runs = [build(name) for name in ("dense_4b", "moe_27b", "engram_27b")]
    assert_matched(*runs)
    assert all(run.model.intermediate_size == active_width(runs[1].model.moe) for run in runs)
    for name in ("dense_4b", "moe_27b", "engram_27b", "engram_40b"):
        run = build(name)
        assert run.data.batch_size * run.data.seq_len * run.train.steps == 262_144_000_000


def test_too_few_experts_given_up():
    with pytest.raises(ConfigError, match="n_routed_experts=40 leaves"):
        engram_twin(moe_tiny(), engram_tiny().model.engram, n_routed_experts=40)


@pytest.mark.parametrize("name", RUNS)
def test_config_is_the_recorded_one(name):
    config, path = to_dict(build(name)), GOLDEN / f"{name}.json"
    if os.environ.get("UPDATE_CONFIGS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config, indent=2) + "\n")
    assert path.exists(), f"{name} has no recorded config; if it is new: {UPDATE}"
    assert config == json.loads(path.read_text()), f"the settings of {name} changed; if they should: {UPDATE}"
    assert from_dict(RunConfig, config) == build(name)


def test_no_recorded_config_is_left_over():
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_every_run_says_its_question_command_and_cost(name):
    doc = RUNS[name].__doc__ or ""
    assert len(doc.splitlines()[0]) > 20 and re.search(rf"experiments.run .*\b{name}\b", doc) and "Cost:" in doc
    assert build(name).name == name
    learning_rate(build(name).optimizer, build(name).train.steps)
