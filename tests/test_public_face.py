"""What `import engram_jax` offers: every name documented, and none imported before it is used."""

import ast
import dataclasses
import inspect
import subprocess
import sys
import textwrap

import pytest

import engram_jax

OBJECTS = [name for name in engram_jax.__all__ if name != "__version__"]


def test_names_are_few_and_sorted_for_a_reader():
    assert len(OBJECTS) == len(set(OBJECTS)) <= 35
    assert set(OBJECTS) <= set(dir(engram_jax))


@pytest.mark.parametrize("name", OBJECTS)
def test_a_name_is_what_its_module_defines(name):
    thing = getattr(engram_jax, name)
    assert thing.__name__.rpartition(".")[2] == name
    assert inspect.getmodule(thing).__name__.startswith("engram_jax")


@pytest.mark.parametrize("name", OBJECTS)
def test_a_name_is_documented(name):
    """A first line that is a statement; a function says what it takes, gives and raises."""
    thing = getattr(engram_jax, name)
    text = inspect.getdoc(thing) or ""
    assert "(" not in text[: len(name) + 1], f"{name} has only the signature that dataclass writes"
    first = text.partition("\n\n")[0].replace("\n", " ")
    assert first.rstrip("`").endswith((".", ":")) or "; " in first, f"{name}: {first!r} is no sentence"
    assert not first.startswith("Of "), f"{name}: {first!r} does not say what it is"
    if inspect.isfunction(thing):
        assert "Raises:" in text or "Args:" in text, f"{name} does not say what it takes and raises"


@pytest.mark.parametrize("name", [name for name in OBJECTS if dataclasses.is_dataclass(getattr(engram_jax, name))])
def test_fields_of_a_dataclass_are_documented(name):
    """A string below each field, which --help, editors and the reference show; or the class has a list of them."""
    thing = getattr(engram_jax, name)
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    missing = []
    for line, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign) and not line.target.id.startswith("_"):
            says = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            is_group = dataclasses.is_dataclass(getattr(thing(), line.target.id)) if name.endswith("Config") else False
            if not says and not is_group and f"  {line.target.id}: " not in thing.__doc__:
                missing.append(line.target.id)
    assert not missing, f"{name}: {missing}"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Engrams'"):
        _ = engram_jax.Engrams


@pytest.mark.parametrize(
    "code",
    [
        "import engram_jax",
        "from engram_jax import RunConfig, EngramConfig, ConfigError, replace",
        "from engram_jax.commands.main import main; main(['--help']); main(['--version'])",
    ],
)
def test_settings_and_help_do_not_wait_for_jax(code):
    subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; sys.exit('jax' in sys.modules)"], check=True, capture_output=True
    )
