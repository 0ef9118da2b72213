import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from engram_jax.config import ConfigError, RunConfig, from_dict, replace
from engram_jax.counts import describe
from engram_jax.errors import FINISHED, INTERRUPTED, TERMINATED, PeersError, RunError
from experiments.run import main
from experiments.runs.registry import RUNS, build


@pytest.fixture
def trained(monkeypatch):
    """The (config, run_dir) pairs that would have been trained; the runs are reported as finished."""
    calls = []

    def train(config, run_dir, **_):
        calls.append((config, run_dir))
        return types.SimpleNamespace(status=FINISHED)

    loop = types.ModuleType("engram_jax.training.loop")
    loop.train = train
    monkeypatch.setitem(sys.modules, "engram_jax.training.loop", loop)
    monkeypatch.setattr("engram_jax.training.loop", loop, raising=False)
    monkeypatch.setattr("engram_jax.commands.run_options.keep_compiled_programs", lambda config: None)
    return calls


@pytest.fixture
def compared(monkeypatch):
    """The lists of run folders that would have been compared."""
    calls = []
    report = "engram_jax.comparison.report.compare"
    monkeypatch.setattr(report, lambda run_dirs: calls.append(run_dirs) or "compare.png")
    return calls


def fails_with(capsys, *arguments):
    """The one line that these arguments are refused with."""
    assert main(arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.startswith("error: ") and streams.err.count("\n") == 1
    return streams.err


def test_list_names_every_run(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RUNS) and all(len(line.split()) > 4 for line in lines)


def test_list_does_not_wait_for_jax():
    code = "import sys, experiments.run as r; r.main(['--list']); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_shows_how(capsys, arguments):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "--list" in out and "--print" in out and "--run_dir" in out and "engram_tiny" in out


def test_help_of_a_run_shows_fields_with_their_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["engram_tiny", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "Does memory beat experts" in out
    assert (
        "--model.engram.engram_layer_ids" in out
        and "(default: 1 2)" in out
        and "Hash heads per order, at least 1." in out
    )


def test_a_run_is_trained_with_its_overrides(trained):
    overrides = ["--train.steps", "50", "--data.seq_len=128", "--train.tensorboard", "False"]
    assert main(["engram_tiny", *overrides, "--model.engram.engram_vocab_size", "101", "211"]) == 0
    [(config, run_dir)] = trained
    assert (config.train.steps, config.data.seq_len, config.train.tensorboard) == (50, 128, False)
    assert config.model.engram.engram_vocab_size == (101, 211)
    assert config.model.moe == build("engram_tiny").model.moe and config.name == "engram_tiny"
    assert run_dir == Path("runs/engram_tiny")


def test_several_runs_share_overrides_in_order_and_are_compared(trained, compared):
    assert main(["moe_tiny", "engram_tiny", "--train.steps", "30", "--run_dir", "out"]) == 0
    assert [(config.name, config.train.steps) for config, _ in trained] == [("moe_tiny", 30), ("engram_tiny", 30)]
    assert [run_dir for _, run_dir in trained] == [Path("out/moe_tiny"), Path("out/engram_tiny")]
    assert compared == [[Path("out/moe_tiny"), Path("out/engram_tiny")]]


def test_run_dir_of_one_run_is_taken_as_given(trained, compared):
    assert main(["moe_tiny", "--run_dir", "out"]) == 0
    assert trained == [(build("moe_tiny"), Path("out"))] and not compared


@pytest.mark.parametrize("status", [INTERRUPTED, TERMINATED])
def test_a_stopped_run_is_not_followed_by_the_next(monkeypatch, trained, compared, status):
    def stopped(config, run_dir, **_):
        trained.append(config.name)
        return types.SimpleNamespace(status=status)

    monkeypatch.setattr(sys.modules["engram_jax.training.loop"], "train", stopped)
    assert main(["moe_tiny", "engram_tiny"]) == status
    assert trained == ["moe_tiny"] and not compared


@pytest.mark.parametrize(("error", "status"), [(RunError, 1), (PeersError, 70)])
def test_a_run_that_cannot_go_on_says_so_in_one_line(capsys, monkeypatch, trained, error, status):
    def fail(config, run_dir, **_):
        raise error("Step 7: loss is nan, so the run stops.")

    monkeypatch.setattr(sys.modules["engram_jax.training.loop"], "train", fail)
    assert main(["moe_tiny"]) == status
    assert capsys.readouterr().err == "error: Step 7: loss is nan, so the run stops.\n"


def test_compiled_programs_are_kept_where_the_user_wants_them(tmp_path):
    import jax

    from engram_jax.commands.command_line import keep_compiled_programs

    name, config = "jax_compilation_cache_dir", replace(build("moe_tiny"), data__cache_dir=str(tmp_path))
    before = jax.config.values[name]
    try:
        for given, kept in ((None, str(tmp_path / "compiled")), ("mine", "mine")):
            jax.config.update(name, given)
            keep_compiled_programs(config)
            assert jax.config.values[name] == kept
    finally:
        jax.config.update(name, before)


def test_print_shows_config_and_counts_and_trains_nothing(capsys, trained):
    assert main(["engram_tiny", "--print", "--train.steps", "50"]) == 0
    out = capsys.readouterr().out
    printed, end = json.JSONDecoder().raw_decode(out)
    config = from_dict(RunConfig, printed)
    assert config.train.steps == 50 and not trained
    assert out[end:].strip() == describe(config).strip()


def test_unknown_run_names_the_nearest(capsys, trained):
    assert "'engram_tny'; the nearest is 'engram_tiny'" in fails_with(capsys, "moe_tiny", "engram_tny")
    assert "--list" in fails_with(capsys, "zzz") and not trained


def test_unknown_field_names_the_nearest(capsys, trained):
    assert "'--train.stpes'; the nearest is '--train.steps'" in fails_with(capsys, "moe_tiny", "--train.stpes", "5")
    assert "'extra'" in fails_with(capsys, "moe_tiny", "--train.steps", "5", "extra") and not trained


def test_options_without_a_name(capsys):
    assert "name comes first" in fails_with(capsys, "--train.steps", "5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.seq_len", "1"], "seq_len=1 must be at least 2."),
        (["--train.grad_accum", "3"], "data.batch_size=16 must be a multiple of train.grad_accum=3."),
        (["--model.num_hidden_layers", "2"], "engram_layer_ids=(1, 2) names block 2"),
    ],
)
def test_values_that_cannot_work(capsys, trained, arguments, message):
    assert message in fails_with(capsys, "engram_tiny", *arguments) and not trained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.steps", "many"], "--train.steps"),
        (["--train.steps"], "--train.steps"),
        (["--optimizer.schedule", "stairs"], "'step', 'cosine'"),
        (["--train.tensorboard", "perhaps"], "--train.tensorboard"),
    ],
)
def test_values_that_do_not_fit_their_type(capsys, trained, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["moe_tiny", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err and not trained


def test_errors_of_training_are_one_line_too(capsys, monkeypatch, trained):
    def fail(config, run_dir, **_):
        raise ConfigError("data.corpus='x' does not exist.")

    monkeypatch.setattr(sys.modules["engram_jax.training.loop"], "train", fail)
    assert "data.corpus='x'" in fails_with(capsys, "moe_tiny")


def test_a_slice_lays_the_run_out_and_overrides_still_count(capsys):
    assert main(["engram_27b", "--slice", "v5p-64", "--train.grad_accum", "20", "--print"]) == 0
    train = json.loads(capsys.readouterr().out.split("\n\ngroup")[0])["train"]
    assert (train["mesh_fsdp"], train["mesh_expert"], train["grad_accum"]) == (32, 1, 20)
    assert main(["moe_27b", "--slice", "v5e-256", "--print"]) == 0
    train = json.loads(capsys.readouterr().out.split("\n\ngroup")[0])["train"]
    assert (train["mesh_fsdp"], train["mesh_expert"], train["grad_accum"]) == (32, 8, 5)
    assert main(["engram_27b", "--slice", "v5p-65"]) == 2
    assert "no v5p slice of 65 chips" in capsys.readouterr().err
