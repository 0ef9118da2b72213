"""`engram-jax train FILE.py:FUNCTION`: the user's file, what its mistakes get, and a run from start to resume."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import engram_jax
from engram_jax import RunConfig, registries
from engram_jax.commands.main import main
from engram_jax.counts import describe
from engram_jax.errors import FINISHED, INTERRUPTED, MISTAKEN
from engram_jax.training.metrics import read_metrics

RUNS = '''
from dataclasses import dataclass
import engram_jax
from engram_jax import RunConfig, replace

def small() -> RunConfig:
    """A small run.

    More about it.
    """
    return RunConfig()

def named() -> engram_jax.RunConfig:
    return RunConfig(name="mine")

def wide() -> "RunConfig":
    """Twice the width."""
    return replace(small(), model__hidden_size=512)

def with_a_default(width=64) -> RunConfig:
    return replace(small(), model__hidden_size=width)

def needs(width, depth) -> RunConfig:
    return replace(small(), model__hidden_size=width)

def number():
    return 3

def divides() -> RunConfig:
    return RunConfig(name=str(1 / 0))

def misspelt() -> RunConfig:
    return replace(small(), train__stpes=3)

def impossible() -> RunConfig:
    return replace(small(), data__seq_len=1)

def wrong_type() -> RunConfig:
    return RunConfig(train=replace(small().train, steps="many"))

def chained() -> RunConfig:
    try:
        return {}["width"]
    except KeyError as error:
        raise ValueError("no width") from error
'''


def line_of(text, file="my_runs.py"):
    return next(i for i, line in enumerate(Path(file).read_text().splitlines(), 1) if text in line)


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """A folder to work in, with my_runs.py; what the file leaves in this process is taken back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    Path("my_runs.py").write_text(RUNS)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("engram_jax_user_"):
            del sys.modules[name]


@pytest.fixture
def trained(monkeypatch):
    """The (config, run_dir) pairs that would have been trained; the runs are reported as finished."""
    calls = []
    monkeypatch.setattr(
        "engram_jax.commands.run_options.train", lambda options, to: calls.append((options.config, to)) or FINISHED
    )
    return calls


@pytest.fixture
def compared(monkeypatch):
    """The lists of run folders that would have been compared."""
    calls = []
    report = "engram_jax.comparison.report.compare"
    monkeypatch.setattr(report, lambda run_dirs: calls.append(run_dirs) or "compare.png")
    return calls


def refused(capsys, *arguments):
    """What `engram-jax train` prints before the error, and the error: one line."""
    try:
        status = main(["train", *arguments])
    except SystemExit as stopped:
        status = stopped.code
    streams = capsys.readouterr()
    assert status == MISTAKEN and streams.out == ""
    *above, last = streams.err.splitlines()
    assert last.startswith("error: ")
    return "\n".join(above), last.removeprefix("error: ")


# --- what is trained ---


def test_a_run_is_trained_under_its_functions_name_with_the_overrides(trained):
    overrides = ["--train.steps", "50", "--data.seq_len=128", "--model.engram.engram_layer_ids", "1", "2"]
    assert main(["train", "my_runs.py:wide", *overrides]) == FINISHED
    [(config, run_dir)] = trained
    assert (config.name, config.model.hidden_size, run_dir) == ("wide", 512, Path("runs/wide"))
    assert (config.train.steps, config.data.seq_len) == (50, 128)
    assert config.model.engram.engram_layer_ids == (1, 2)


def test_a_name_that_the_run_has_stays(trained):
    assert main(["train", "my_runs.py:named", "--run_dir", "elsewhere"]) == FINISHED
    [(config, run_dir)] = trained
    assert (config.name, run_dir) == ("mine", Path("elsewhere"))


def test_several_runs_are_trained_in_order_and_compared(trained, compared, capsys):
    words = ["my_runs.py:wide", "my_runs.py:small", "--run_dir", "out", "--train.steps", "7"]
    assert main(["train", *words]) == FINISHED
    assert [(config.name, config.train.steps, to) for config, to in trained] == [
        ("wide", 7, Path("out/wide")),
        ("small", 7, Path("out/small")),
    ]
    assert compared == [[Path("out/wide"), Path("out/small")]] and "compare.png" in capsys.readouterr().out


def test_one_run_is_not_compared(trained, compared):
    assert main(["train", "my_runs.py:small"]) == FINISHED
    assert len(trained) == 1 and not compared


def test_a_stopped_run_is_not_followed_by_the_next(monkeypatch, compared):
    calls = []
    monkeypatch.setattr(
        "engram_jax.commands.run_options.train", lambda options, to: calls.append(options.config.name) or INTERRUPTED
    )
    assert main(["train", "my_runs.py:small", "my_runs.py:wide"]) == INTERRUPTED
    assert calls == ["small"] and not compared


def test_files_beside_the_file_can_be_imported(trained):
    Path("sizes.py").write_text("WIDTH = 96\n")
    Path("uses.py").write_text(RUNS.replace("hidden_size=512", "hidden_size=__import__('sizes').WIDTH"))
    assert main(["train", "uses.py:wide"]) == FINISHED
    assert trained[0][0].model.hidden_size == 96


def test_two_files_of_one_name(trained, compared):
    for folder, width in (("a", 32), ("b", 64)):
        Path(folder).mkdir()
        Path(folder, "my.py").write_text(RUNS.replace("512", str(width)).replace("def wide", f"def wide_{folder}"))
    assert main(["train", "a/my.py:wide_a", "b/my.py:wide_b"]) == FINISHED
    assert [config.model.hidden_size for config, _ in trained] == [32, 64]


def test_a_slice_lays_the_run_out_and_overrides_still_count(capsys):
    words = ["--slice", "v5p-8", "--data.batch_size", "32", "--print"]
    assert main(["train", "my_runs.py:small", *words]) == FINISHED
    printed, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
    assert printed["train"]["mesh_fsdp"] == 8 and printed["data"]["batch_size"] == 32


# --- what is shown ---


def test_print_shows_settings_and_counts_and_trains_nothing(capsys, trained):
    assert main(["train", "my_runs.py:small", "--print", "--train.steps", "50"]) == FINISHED
    out = capsys.readouterr().out
    printed, end = json.JSONDecoder().raw_decode(out)
    config = engram_jax.replace(RunConfig(name="small"), train__steps=50)
    assert printed["train"]["steps"] == 50 and printed["name"] == "small" and not trained
    assert out[end:].strip() == describe(config).strip()


def test_list_names_the_functions_that_return_runs(capsys):
    assert main(["train", "my_runs.py", "--list"]) == FINISHED
    lines = capsys.readouterr().out.splitlines()
    names = ["small", "named", "wide", "with_a_default", "divides", "misspelt", "impossible", "wrong_type", "chained"]
    assert [line.split()[0] for line in lines] == names
    assert lines[0].split(maxsplit=1)[1] == "A small run."
    assert main(["train", "my_runs.py:small", "--list"]) == FINISHED
    assert capsys.readouterr().out.splitlines() == lines


def test_help_of_a_run_shows_its_docstring_and_fields_with_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "my_runs.py:wide", "--help"])
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stopped.value.code == 0 and "Twice the width." in out
    assert "--model.hidden_size INT" in out and "(default: 512)" in out and "--slice" in out and "--run_dir" in out


def test_help_of_a_file_lists_its_runs(capsys):
    assert main(["train", "my_runs.py", "--help"]) == FINISHED
    out = capsys.readouterr().out
    assert "--print" in out and "small           A small run." in out


# --- mistakes ---


def test_an_unknown_function_gets_the_nearest_and_those_that_return_runs(capsys):
    above, error = refused(capsys, "my_runs.py:smal")
    assert not above and error.startswith(
        "my_runs.py has no function 'smal'; the nearest is 'small'. It declares small,"
    )
    assert "number" not in error and "needs" not in error
    assert "has no function 'RunConfig'" in refused(capsys, "my_runs.py:RunConfig")[1]


def test_a_file_without_a_function_gets_those_that_return_runs(capsys):
    _, error = refused(capsys, "my_runs.py")
    assert error.startswith("my_runs.py: name a function, engram-jax train my_runs.py:FUNCTION. It declares small,")
    assert refused(capsys, "my_runs.py:small:", "--print")[1].startswith("my_runs.py:small: is not FILE.py:FUNCTION.")


def test_without_annotations_the_functions_without_arguments_are_named(capsys):
    Path("plain.py").write_text("def small():\n    ...\n\ndef _hidden():\n    ...\n\ndef needs(x):\n    ...\n")
    assert refused(capsys, "plain.py")[1].endswith("It declares small.")
    Path("none.py").write_text("WIDTH = 3\n")
    assert "It declares no run: write a function without arguments" in refused(capsys, "none.py")[1]
    assert "It declares no run" in refused(capsys, "none.py", "--list")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.py:small"], "there is no file nowhere.py."),
        (["nowhere.py", "--list"], "there is no file nowhere.py."),
        (["my_runs.txt:small"], "my_runs.txt is not a Python file: its name must end in .py."),
        (["my_runs"], "my_runs is not FILE.py:FUNCTION."),
        (["--train.steps", "5"], "the file comes first: engram-jax train FILE.py:FUNCTION --train.steps 5"),
        (["my_runs.py:number"], "my_runs.py:number returned an int: it must return an engram_jax.RunConfig."),
        (["my_runs.py:needs"], "my_runs.py:needs needs the arguments width, depth: give them defaults"),
        (["my_runs.py:small", "my_runs.py:small"], "two runs are called 'small'"),
        (["my_runs.py:small", "my_runs.py:smal"], "has no function 'smal'"),
        (
            ["my_runs.py:small", "--train.stpes", "5"],
            "there is no option '--train.stpes'; the nearest is '--train.steps'",
        ),
        (["my_runs.py:small", "--run_dri", "x"], "there is no option '--run_dri'; the nearest is '--run_dir'"),
        (["my_runs.py:small", "--train.steps", "many"], "--train.steps: 'many' is not a whole number."),
        (["my_runs.py:small", "--data.corpus", "a.txt", "b.txt"], "'b.txt' after --data.corpus is one word too many"),
        (["my_runs.py:small", "--print", "my_runs.py:wide"], "names come before options"),
        (["my_runs.py:small", "--slice", "v5p-65"], "no v5p slice of 65 chips"),
        (["my_runs.py:small", "--slice"], "--slice needs the name of a TPU slice"),
        (["my_runs.py:small", "--data.seq_len", "1"], "seq_len=1 must be at least 2."),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, trained, words, message):
    above, error = refused(capsys, *words)
    assert message in error and not above and not trained


@pytest.mark.parametrize(
    ("name", "code", "error"),
    [
        ("divides", "1 / 0", "ZeroDivisionError: division by zero"),
        ("wrong_type", 'steps="many"', "TypeError: '>' not supported between instances of 'str' and 'int'"),
        ("chained", "from error", "ValueError: no width"),
    ],
)
def test_a_function_that_raises_is_shown_with_its_own_lines_alone(capsys, trained, name, code, error):
    above, last = refused(capsys, f"my_runs.py:{name}")
    assert last == f"my_runs.py:{line_of(code)}: {error}"
    assert f"line {line_of(code)}, in {name}" in above and above.splitlines()[-1] == error
    assert "site-packages" not in above and str(Path(engram_jax.__file__).parent) not in above
    assert ('{}["width"]' in above) == (name == "chained") and not trained


def test_a_setting_that_cannot_work_is_told_with_its_line(capsys):
    for name, code, message in (
        ("misspelt", "stpes=3", "TrainConfig has no field 'stpes'; the nearest is 'steps'."),
        ("impossible", "seq_len=1", "seq_len=1 must be at least 2."),
    ):
        assert refused(capsys, f"my_runs.py:{name}") == ("", f"my_runs.py:{line_of(code)}: {message}")


@pytest.mark.parametrize(
    ("text", "line", "error"),
    [
        ("x = 3\nimport no_such_package\n", 2, "ModuleNotFoundError: No module named 'no_such_package'"),
        ("x = 3\n\ny = (\n", 3, "SyntaxError: '(' was never closed"),
        ("raise ValueError\n", 1, "ValueError"),
    ],
)
def test_a_file_that_raises_is_shown_with_its_line_and_none_of_ours(capsys, text, line, error):
    Path("fails.py").write_text(text)
    above, last = refused(capsys, "fails.py:small")
    assert last.startswith(f"fails.py:{line}: {error}")
    assert "fails.py" in above and error in above and "frozen" not in above and "user_file" not in above
    assert refused(capsys, "fails.py:small") == (above, last)  # it is not kept half loaded


# --- a whole run ---

OWN = '''
from dataclasses import dataclass

from engram_jax import AttentionConfig, CheckpointConfig, DataConfig, EngramConfig, ModelConfig, OptimizerConfig
from engram_jax import RunConfig, TrainConfig, registries
from engram_jax.memory.row_optimizers import RowwiseAdagrad


@dataclass(frozen=True, eq=False)
class HalfAdagrad(RowwiseAdagrad):
    """Adagrad at half the rate."""

    @classmethod
    def create(cls, config, learning_rates):
        return cls(learning_rates / 2, config.adam_eps)


registries.ROW_OPTIMIZERS.register("half_adagrad", HalfAdagrad)


def own() -> RunConfig:
    """A tiny model whose rows move by an optimizer of this file."""
    attention = AttentionConfig(
        num_attention_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=16
    )
    engram = EngramConfig(engram_layer_ids=(0,), engram_n_heads=2, engram_head_dim=8, engram_vocab_size=101)
    model = ModelConfig(
        vocab_size=280, hidden_size=32, num_hidden_layers=1, intermediate_size=48, attention=attention,
        engram=engram, hc_mult=1, dtype="float32",
    )
    return RunConfig(
        model=model,
        data=DataConfig(corpus="corpus", cache_dir="cache", seq_len=32, batch_size=8, holdout_fraction=0.2),
        optimizer=OptimizerConfig(table_optimizer="half_adagrad", warmup_steps=1),
        train=TrainConfig(steps=3, log_every=1, eval_every=0, eval_batches_final=2, tensorboard=False),
        checkpoint=CheckpointConfig(every=1),
    )
'''


@pytest.fixture
def half_adagrad():
    yield
    if "half_adagrad" in registries.ROW_OPTIMIZERS:
        registries.ROW_OPTIMIZERS.unregister("half_adagrad")


def losses(run_dir):
    return {line["step"]: line["loss"] for line in read_metrics(Path(run_dir)) if "loss" in line}


def test_a_file_trains_with_a_variant_of_its_own_and_resumes(capsys, files, monkeypatch, half_adagrad):
    """The variant is known again only where the file is run again, as in a new process."""
    monkeypatch.setattr("engram_jax.commands.run_options.keep_compiled_programs", lambda config: None)
    words = np.random.default_rng(3).choice(["def", "self", "return", "value", "import", "none"], (60, 40))
    (files / "corpus").mkdir()
    for i, line in enumerate(words):
        (files / "corpus" / f"{i}.txt").write_text(f"{i} {' '.join(line)}")
    (files / "own_runs.py").write_text(OWN)

    assert main(["train", "own_runs.py:own"]) == FINISHED
    assert "Done: own, 3 steps" in capsys.readouterr().out
    whole = losses("runs/own")
    assert set(whole) == {1, 2, 3} and whole[3] < whole[1]

    def forget():
        registries.ROW_OPTIMIZERS.unregister("half_adagrad")
        del sys.modules["engram_jax_user_own_runs"]

    # As after a crash in the third step: the same command goes on from the second.
    forget()
    shutil.rmtree("runs/own/checkpoints/3")
    Path("runs/own/result.json").unlink()
    assert main(["train", "own_runs.py:own"]) == FINISHED
    said = capsys.readouterr().out
    assert "Resumed at step 2 of 3." in said and "Done: own, 3 steps" in said
    assert losses("runs/own") == whole

    forget()
    assert main(["export", "runs/own", "exported"]) == MISTAKEN
    assert "half_adagrad" in capsys.readouterr().err.splitlines()[-1]
    assert main(["--with", "own_runs.py", "export", "runs/own", "exported"]) == FINISHED
    assert Path("exported/config.json").is_file()
