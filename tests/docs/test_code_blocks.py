"""Every code block, command and link of README.md, CONTRIBUTING.md, docs/ and tpu/README.md.

Python is compiled, its imports from this repository resolve, and blocks marked `<!-- run: NAME -->` are executed. Each
command of ours, in a block or in a line of text, is parsed by its own parser; nothing is run. Links lead to files and
headings that exist, and names of Python files are those of files.
"""

import ast
import importlib
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from command_lines import OURS, check, commands, lines
from markdown_pages import PAGES, ROOT, blocks, name_of, prose

SHELL = ("", "bash", "sh", "shell", "console", "text")
PACKAGES = ("engram_jax", "experiments", "tpu", "benchmarks")
TESTED_ELSEWHERE = {"docs/your_own_model.md"}
"""Pages whose blocks another test executes, and looks at what they computed."""
SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
LINK = re.compile(r"(?<!\!)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


def pytest_generate_tests(metafunc):
    if "page" in metafunc.fixturenames:
        metafunc.parametrize("page", PAGES, ids=name_of)


def test_a_page_is_read_as_markdown_readers_read_it(tmp_path, monkeypatch):
    """What the other tests stand on."""
    monkeypatch.setattr("markdown_pages.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "Text `a`\n\n<!-- run: one -->\n```python\nx = 1\n```\n\n1. item:\n\n   ```bash\n   a \\\n     b  # c\n   ```\n"
    )
    first, second = blocks(page)
    assert (first.language, first.text, first.run, first.place) == ("python", "x = 1\n", "one", "page.md:5")
    assert (second.language, second.text, second.run) == ("bash", "a \\\n  b  # c\n", "")
    assert [commands(line) for line in lines(second.text)] == [[["a", "b"]]]
    assert prose(page).splitlines()[0] == "Text `a`" and "x = 1" not in prose(page)
    assert commands("A=b uv run --extra dev x 'c d' [--e f] --g ... > out | y && z") == [
        ["x", "c d", "--e", "f"],
        ["y"],
        ["z"],
    ]


@pytest.mark.parametrize(
    "command",
    [
        "engram-jax smaple runs/x",
        "engram-jax sample runs/x --max_token 3",
        "engram-jax evaluate runs/x --tasks perplexty",
        "engram-jax evaluate runs/x --perplexity.contxt 3",
        "engram-jax export runs/x new --dtype float16",
        "engram-jax attach runs/x new --train.stpes 3",
        "engram-jax train my_runs.py:small --train.stpes 3",
        "uv run --extra tpus engram-jax --help",
        "python -m experiments.run engram_tny",
        "python -m experiments.run engram_tiny --train.steps many",
        "python -m experiments.run engram_tiny --slice v5p-65",
        "python -m experiments.study alocation",
        "python -m experiments.study ablations --sclae tiny",
        "python -m experiments.plan --budget 2e20 --topology v5p-65",
        "python -m experiments.compile engram_27b --topology v5p-64 --quickly",
        "python -m experiments.compile --matrix engram_28b",
        "python -m tpu craete small --type v5e-8",
        "python -m tpu launch small engram_tiny --run-dir gs://b/r -- --train.stpes 3",
        "python benchmarks/nowhere.py",
        ".ci/run fats",
    ],
)
def test_a_wrong_command_is_noticed(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_runs.py").write_text("from engram_jax import RunConfig\n\ndef small():\n    return RunConfig()\n")
    with pytest.raises(AssertionError):
        [check(words, monkeypatch) for words in commands(command)]


def test_commands_of_blocks_are_accepted(page, tmp_path, monkeypatch, capsys):
    """In a block of shell every line must be shell; a block without a language may also hold other text."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.language not in SHELL:
            continue
        for line in lines(block.text):
            if block.language in ("bash", "sh", "shell") or OURS.match(line):
                check_line(line, block.place, monkeypatch)
    capsys.readouterr()


def test_commands_in_text_are_accepted(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for span in SPAN.findall(prose(page)):
        line = " ".join(span.split())
        if OURS.match(line) and len(line.split()) > 2:  # shorter ones name a command
            check_line(line, f"{name_of(page)}: `{line}`", monkeypatch)
    capsys.readouterr()


def check_line(line, place, monkeypatch):
    try:
        for words in commands(line):
            check(words, monkeypatch)
    except (ValueError, AssertionError) as error:
        raise AssertionError(f"{place}: {line}\n{error}") from None


def test_python_compiles_and_what_it_imports_from_here_exists(page):
    for block in blocks(page):
        if block.language != "python":
            continue
        tree = ast.parse(block.text, block.place)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
                for alias in node.names:
                    assert found(node.module, alias.name), f"{block.place}: {node.module} has no {alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] in PACKAGES:
                        importlib.import_module(alias.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "engram_jax":
                assert found("engram_jax", node.attr), f"{block.place}: engram_jax has no {node.attr}"


def found(module, name):
    if hasattr(importlib.import_module(module), name):
        return True
    return importlib.util.find_spec(f"{module}.{name}") is not None


def test_other_languages_parse(page):
    parsers = {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load, "yml": yaml.safe_load}
    for block in blocks(page):
        if parse := parsers.get(block.language):
            try:
                parse(block.text)
            except ValueError as error:
                raise AssertionError(f"{block.place}: {error}") from None


def test_marked_blocks_run(page, tmp_path, monkeypatch):
    """Blocks of one name together, in an empty folder."""
    if name_of(page) in TESTED_ELSEWHERE:
        assert any(block.run for block in blocks(page))
        return
    names: dict[str, dict] = {}
    for block in blocks(page):
        if block.run:
            assert block.language == "python", f"{block.place}: only Python is executed"
            monkeypatch.chdir(tmp_path)
            code = compile("\n" * (block.line - 1) + block.text, ROOT / block.page, "exec")
            exec(code, names.setdefault(block.run, {"__name__": "page"}))


# --- links ---


def headings(page):
    """The anchors of a page, as GitHub makes them."""
    anchors: dict[str, int] = {}
    for line in prose(page).splitlines():
        if heading := re.match(r"#+ +(.*?) *#*$", line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            anchors[slug] = anchors.get(slug, -1) + 1
    return {f"{slug}-{i}" if i else slug for slug, last in anchors.items() for i in range(last + 1)}


def test_links_lead_somewhere(page):
    text = prose(page)
    for link in [*LINK.findall(text), *IMAGE.findall(text)]:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link} leads to no file"
        if anchor and target.suffix == ".md":
            assert anchor in headings(target), f"{name_of(page)}: {link}: {sorted(headings(target))}"


def test_names_of_python_files_are_those_of_files(page):
    """`memory/store.py` may be written from the repository's root, a package's, or the page's folder."""
    roots = (ROOT, ROOT / "engram_jax", ROOT / "experiments", page.parent)
    for span in SPAN.findall(prose(page)):
        path = span.split(":")[0]
        if re.fullmatch(r"[\w./-]+/[\w.-]+\.py", path) and not re.search(r"[A-Z]{3}|my_|their_", path):
            assert any((root / path).is_file() for root in roots), f"{name_of(page)}: there is no file {path}"


def test_no_page_is_forgotten():
    assert {name_of(page) for page in PAGES} >= {"README.md", "tpu/README.md", "docs/index.md", "docs/api/index.md"}
    assert all(isinstance(page, Path) and page.is_file() for page in PAGES)
