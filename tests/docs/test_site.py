"""The documentation as a site: it builds without a warning, and has every public name in its reference."""

import os
import re
import subprocess
import sys

import pytest
from markdown_pages import ROOT

import engram_jax

REFERENCE = {path: path.read_text() for path in (ROOT / "docs" / "api").glob("*.md")}


@pytest.mark.parametrize("name", [name for name in engram_jax.__all__ if name != "__version__"])
def test_a_public_name_has_one_place_in_the_reference(name):
    directives = [line for text in REFERENCE.values() for line in text.splitlines() if line == f"::: engram_jax.{name}"]
    assert len(directives) == 1, f"write ::: engram_jax.{name} into a page of docs/api"
    overview = (ROOT / "docs" / "api" / "index.md").read_text()
    assert f"`{name}`" in overview, f"name `{name}` in the table of docs/api/index.md"


def test_the_reference_has_no_other_name():
    named = re.findall(r"^::: engram_jax\.(\w+)$", "\n".join(REFERENCE.values()), re.MULTILINE)
    assert set(named) == set(engram_jax.__all__) - {"__version__"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site's folder, built strictly: a broken link, anchor or docstring is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_builds_strictly_and_documents_every_public_name(site):
    built = "".join(page.read_text() for page in (site / "api").rglob("*.html"))
    missing = [name for name in engram_jax.__all__ if f'id="engram_jax.{name}"' not in built]
    assert missing == ["__version__"]


def test_links_out_of_the_pages_lead_to_the_repository(site):
    page = (site / "your_own_model" / "index.html").read_text()
    repository = re.search(r"^repo_url: (.*)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)[1]
    assert f'href="{repository}/blob/main/notebooks/your_own_model.ipynb"' in page
    assert 'href="../memory/"' in page and not list(site.rglob("*.py"))
