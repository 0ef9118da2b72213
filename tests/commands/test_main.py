"""`engram-jax`: its subcommands, their help, and what mistakes get."""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
import textwrap
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import engram_jax
from engram_jax.commands.main import SUBCOMMANDS, main
from engram_jax.commands.run_options import Options as RunOptions
from engram_jax.config import to_dict
from engram_jax.errors import missing_extra

ROOT = Path(__file__).parents[2]

OPTIONS = ("sample", "evaluate", "compare", "export", "import")
"""Subcommands with a dataclass of options; those that train take a run's fields."""


def module_of(name):
    return importlib.import_module(f"engram_jax.commands.{SUBCOMMANDS[name][0]}")


def help_of(capsys, *words):
    """What `--help` prints, as one line without frames."""
    with contextlib.suppress(SystemExit):
        assert main([*words, "--help"]) == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def fails_with(capsys, *arguments):
    """The one line that these arguments are refused with."""
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    streams = capsys.readouterr()
    assert status == 2 and streams.out == ""
    assert streams.err.startswith("error: ") and streams.err.count("\n") == 1
    return streams.err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_has_a_line_for_each_subcommand(capsys, arguments):
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, about) in SUBCOMMANDS.items():
        assert any(line.split()[:1] == [name] and about in line for line in lines)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"engram_jax {engram_jax.__version__}\n"


def test_the_console_script_and_the_module_are_this_command(capsys):
    (script,) = entry_points(group="console_scripts", name="engram-jax")
    assert script.load() is main
    said = subprocess.run([sys.executable, "-m", "engram_jax", "--help"], capture_output=True, text=True, check=True)
    assert main(["--help"]) == 0 and said.stdout == capsys.readouterr().out
    failed = subprocess.run([sys.executable, "-m", "engram_jax", "trian"], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "there is no subcommand 'trian'; the nearest is 'train'."),
        (["exports"], "there is no subcommand 'exports'; the nearest is 'export'."),
        (["nosuch"], f"there is no subcommand 'nosuch'; there are {', '.join(SUBCOMMANDS)}."),
        (["--versoin"], "there is no option '--versoin'; the nearest is '--version'."),
        (["--quickly"], "--help lists them all"),
        (["--with"], "--with needs a Python file"),
        (["--with", "nowhere.py", "sample", "x"], "there is no file nowhere.py."),
        (["sample"], "RUN_DIR is missing."),
        (["export", "runs/x"], "FOLDER is missing."),
        (["sample", "runs/x", "--max_token", "3"], "there is no option '--max_token'; the nearest is '--max_tokens'."),
        (["sample", "runs/x", "one prompt", "another"], "'another' is one word too many: quote"),
        (["sample", "runs/x", "--top_p", "x"], "--top_p: 'x' is not a number."),
        (["sample", "runs/x", "--top_k", "1.5"], "--top_k: '1.5' is not a whole number."),
        (["sample", "runs/x", "--top_k"], "--top_k needs a value."),
        (["sample", "runs/x", "--placement", "hsot"], "--placement: 'hsot' is not one of"),
        (["export", "runs/x", "new", "--dtype", "float16"], "--dtype: 'float16' is not one of 'float32', 'bfloat16'."),
        (["import", "folder", "runs/x", "--dtpye", "float32"], "there is no option '--dtpye'"),
        (["compare", "runs/x", "--ouptut", "new"], "there is no option '--ouptut'; the nearest is '--output'."),
        (["evaluate", "runs/x", "--limt", "3"], "there is no option '--limt'; the nearest is '--limit'."),
        (["evaluate", "runs/x", "--batch_tokens", "0"], "batch_tokens=0 must be positive."),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(capsys, arguments, message):
    assert message in fails_with(capsys, *arguments)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_begins_with_what_the_subcommand_does_and_shows_an_example(capsys, name):
    text = help_of(capsys, name)
    assert f"engram-jax {name} runs/" in text or f"engram-jax {name} my_runs.py:" in text or "exported/" in text
    assert "experiments.run" not in text


@pytest.mark.parametrize("name", OPTIONS)
def test_help_lists_every_option_with_its_meaning(capsys, name):
    text, options = help_of(capsys, name), module_of(name).Options
    for field, about in documented(options).items():
        if field != "shared":  # a group of options of its own
            assert about, f"{name}: {field} has no docstring"
            assert " ".join(about.split())[:40] in text, f"{name}: {field}"


def test_the_options_of_commands_that_train_are_documented():
    assert all(about for field, about in documented(RunOptions).items() if field != "config")


def documented(options):
    """Field -> the docstring below it in the source; empty without one."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(options))).body
    found = {}
    for line, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign):
            text = following.value if isinstance(following, ast.Expr) else None
            found[line.target.id] = text.value if isinstance(text, ast.Constant) else ""
    assert set(found) == {field.name for field in dataclasses.fields(options)}
    return found


def test_help_does_not_wait_for_jax():
    code = f"""
import sys
from engram_jax.commands.main import main
for name in {list(SUBCOMMANDS)}:
    try:
        main([name, "--help"])
    except SystemExit as stopped:
        assert stopped.code == 0
    assert "jax" not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_missing_extra_is_named_as_the_project_spells_it():
    """Wherever the code asks for one: the extra exists, and brings the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        [argument.value for argument in call.args]
        for path in [*ROOT.glob("engram_jax/**/*.py"), *ROOT.glob("experiments/**/*.py")]
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "missing_extra"
    ]
    assert ["lm_eval", "eval"] in asked
    for package, extra in asked:
        brought = " ".join(project["optional-dependencies"][extra])
        assert package in brought or (package, extra) == ("libtpu", "tpu"), f"{extra} does not bring {package}"
        said = missing_extra(package, extra)
        assert f"uv run --extra {extra}" in said and f"pip install '{project['name']}[{extra}]'" in said


def test_attach_has_the_fields_and_overrides_of_train(capsys, tmp_path, monkeypatch):
    """After RUN_DIR NAME, with the backbone's settings as defaults."""
    monkeypatch.chdir(tmp_path)
    backbone = engram_jax.RunConfig(name="backbone", train=engram_jax.TrainConfig(steps=77))
    Path("backbone").mkdir()
    Path("backbone/config.json").write_text(json.dumps(to_dict(backbone)))
    text = help_of(capsys, "attach", "backbone", "with_memory")
    assert "usage: engram-jax attach backbone with_memory" in text and "--slice STR" in text
    assert "--train.steps INT" in text and "(default: 77)" in text and "--train.init_from STR" in text
    assert main(["attach", "backbone", "with_memory", "--train.steps", "9", "--print"]) == 0
    printed, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
    assert (printed["name"], printed["train"]["steps"], printed["train"]["init_from"]) == ("with_memory", 9, "backbone")
    assert "nearest is '--train.steps'" in fails_with(capsys, "attach", "backbone", "with_memory", "--train.stpes", "3")
    assert "has no config.json" in fails_with(capsys, "attach", "nowhere", "with_memory")
