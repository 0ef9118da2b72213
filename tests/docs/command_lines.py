"""Commands in the pages, each parsed by the command's own parser; nothing of what they would do is done.

A page may write placeholders in capitals (RUN_DIR, NAME, FILE.py), options in brackets, and `...` for others.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

from markdown_pages import ROOT

from engram_jax.commands import main as engram_jax_main
from engram_jax.config import EngramConfig, replace, to_dict
from experiments.runs.registry import build

OPERATORS = {"|", "||", "&&", ";", "&"}
REDIRECTS = {">", ">>", "<", "2>"}
OURS = re.compile(r"^(uv run .*)?(engram-jax|python3? (-m (engram_jax|experiments|tpu)|benchmarks/)|\.ci/run|pytest)\b")


class Reached(BaseException):
    """The command has read its arguments and would begin its work."""


def reach(*arguments: object, **settings: object) -> None:
    raise Reached


def lines(text: str) -> Iterator[str]:
    """Lines of a shell block, those that end in a backslash joined with the next."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        yield re.sub(r"^\$ ", "", line.strip())


def commands(line: str) -> list[list[str]]:
    """The words of each command in a line of shell: without comments, operators, redirections and settings before it.

    Raises:
      ValueError: the line is not shell.
    """
    line = line.replace("$'", "'").replace("…", "...")
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    words = iter(lexer)
    for word in words:
        if word in OPERATORS:
            found.append([])
        elif word in REDIRECTS:
            next(words, None)
        else:
            found[-1].append(word)
    return [plain for words in found if (plain := _plain(words))]


def _plain(words: list[str]) -> list[str]:
    """A command without `VARIABLE=value` before it, `uv run` with its options, brackets and dots."""
    while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
        words = words[1:]
    if words[:2] == ["uv", "run"]:
        words = words[2:]
        while words and words[0].startswith("-"):
            if words[0] == "--extra":
                check_extra(words[1])
            words = words[1:] if words[0] in ("--quiet", "-q", "--locked", "--no-sync") else words[2:]
    kept: list[str] = []
    for word in words:
        word = word.removeprefix("[").removesuffix("]") if word[:1] == "[" or word[-1:] == "]" else word
        if word == "..." and kept and kept[-1].startswith("--"):
            kept.pop()  # an option whose value the page leaves open
        elif word not in ("...", ""):
            kept.append(word)
    return kept


def check_extra(name: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert name in extras, f"there is no extra {name!r}: {', '.join(extras)}"


def check(words: list[str], monkeypatch) -> None:
    """Parses one command, in an empty current folder. A command of another program is left alone.

    Raises:
      AssertionError: the command refuses its arguments, or a file of the repository that it names is missing.
    """
    program, *arguments = words
    if program in ("python", "python3"):
        if arguments[0] == "-m":
            _check_module(arguments[1], arguments[2:], monkeypatch)
        elif arguments[0].endswith(".py"):
            assert (ROOT / arguments[0]).is_file(), f"there is no file {arguments[0]}"
    elif program == "engram-jax":
        _check_engram_jax(arguments, monkeypatch)
    elif program == "pytest":
        paths = [word for word in arguments if "/" in word and not re.search(r"[A-Z]{3}", word)]
        assert all((ROOT / path).exists() for path in paths), paths
    elif program == ".ci/run":
        steps = re.search(r"^STEPS=\((.*)\)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
        assert steps and set(arguments) <= set(steps[1].split()), arguments
    elif words[:2] in (["uv", "sync"], ["uv", "tool"], ["pip", "install"]):
        for word, following in zip(words, [*words[1:], ""], strict=True):
            if word == "--extra":
                check_extra(following)
            for extra in re.findall(r"engram_jax\[([\w,]+)\]", word):
                [check_extra(one) for one in extra.split(",")]


def _check_module(module: str, arguments: list[str], monkeypatch) -> None:
    if module == "engram_jax":
        _check_engram_jax(arguments, monkeypatch)
    elif module == "tpu":
        _check_tpu(arguments, monkeypatch)
    elif module.startswith("experiments."):
        _stub_experiments(monkeypatch)
        if arguments and re.fullmatch(r"[A-Z_]+", arguments[0]):
            arguments = [{"experiments.study": "ablations"}.get(module, "engram_tiny"), *arguments[1:]]
        _accepted(importlib.import_module(module).main, arguments)
    elif module.startswith("engram_jax."):
        assert importlib.util.find_spec(module), f"there is no module {module}"  # a program with a parser not of ours


def _accepted(command: Callable[[list[str]], int], arguments: list[str]) -> None:
    try:
        status = command(list(arguments))
    except Reached:
        return
    except SystemExit as stopped:
        status = stopped.code
    assert status == 0, f"refused: {shlex.join(arguments)}"


def _stub_training(monkeypatch) -> None:
    monkeypatch.setattr("engram_jax.commands.run_options.train", lambda options, run_dir: 0)
    monkeypatch.setattr("engram_jax.commands.run_options.show", lambda config: None)
    monkeypatch.setattr("engram_jax.comparison.report.compare", reach)


def _stub_experiments(monkeypatch) -> None:
    _stub_training(monkeypatch)
    from experiments import compile, plan, study
    from experiments.pods import compile_matrix

    for name, stub in {
        "execute": reach,
        "write_report": reach,
        "write_analysis": reach,
        "check_corpus": lambda *_: None,
        "agree_on_plan": lambda *_, **__: None,
        "_plan": lambda *_: "",
        "runs_from_files": lambda *_: {},
    }.items():
        monkeypatch.setattr(study, name, stub)
    monkeypatch.setattr(plan, "plan", reach)
    monkeypatch.setattr(compile, "compile_report", reach)
    monkeypatch.setattr(compile_matrix, "topology", reach)
    monkeypatch.setattr(compile_matrix, "write_table", reach)


def _check_engram_jax(arguments: list[str], monkeypatch) -> None:
    from engram_jax.commands import compare, evaluate, sample

    _stub_training(monkeypatch)

    def tasks_are_known(options, *_) -> None:
        from engram_jax.evaluation.tasks import split_name

        [split_name(word) for word in options.tasks]
        raise Reached

    monkeypatch.setattr(sample, "sample", reach)
    monkeypatch.setattr(compare, "compare", reach)
    monkeypatch.setattr(evaluate, "evaluate", tasks_are_known)
    monkeypatch.setattr(evaluate, "saved", tasks_are_known)
    monkeypatch.setattr("engram_jax.interop.runs.export_run", reach)
    monkeypatch.setattr("engram_jax.interop.runs.import_run", reach)
    monkeypatch.setattr("engram_jax.commands.attach.train", reach)
    monkeypatch.setattr("engram_jax.commands.attach.show", reach)
    if arguments[:1] == ["--with"]:
        _write_runs(arguments[1], ())
    if arguments[:1] == ["SUBCOMMAND"]:
        arguments = ["sample", *arguments[1:]]
    if arguments[:1] == ["train"]:
        for target in arguments[1:]:
            if ".py" in target:
                file, _, function = target.partition(":")
                _write_runs(file, [function or "small"])
    if arguments[:1] == ["attach"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        _write_backbone(Path(arguments[1]))
    _accepted(engram_jax_main.main, arguments)


def _write_runs(file: str, functions) -> None:
    """A user's file with these functions beside those that it has."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else "from experiments.runs.registry import build\n"
    for function in functions:
        text += f"def {function}():\n    return build('engram_tiny')\n"
    path.write_text(text)
    sys.modules.pop(f"engram_jax_user_{path.stem}", None)  # as an earlier command loaded the file


def _write_backbone(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(build("moe_tiny"), model__engram=EngramConfig())
    (folder / "config.json").write_text(json.dumps(to_dict(config)))


def _check_tpu(arguments: list[str], monkeypatch) -> None:
    from tpu.__main__ import parser

    bare = arguments.index("--") if "--" in arguments else len(arguments)
    ours = [re.sub(r"^--[\w-]+", lambda flag: flag[0].replace("_", "-"), word) for word in arguments[:bare]]
    if not ours or ours == ["VERB"]:
        return
    runs: list[str] = []

    def parse(words: list[str]) -> int:
        runs.append(getattr(parser().parse_args(words), "run", ""))
        return 0

    _accepted(parse, ["create" if word == "VERB" else word for word in ours])
    overrides = arguments[bare + 1 :]
    if overrides and runs and runs[0]:
        _stub_experiments(monkeypatch)
        _accepted(importlib.import_module("experiments.run").main, [runs[0], *overrides])
