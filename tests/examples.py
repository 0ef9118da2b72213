"""The Python files that a page shows, imported as a reader's own files are."""

import importlib.util
import re
import sys
from pathlib import Path

PAGES = Path(__file__).parents[1] / "docs"


def module_of(page, definition, folder):
    """The page's file that has a line with this beginning, written to `folder` and imported."""
    files = re.findall(r"^```python\n(.*?)^```", (PAGES / page).read_text(), re.MULTILINE | re.DOTALL)
    [text] = [file for file in files if re.search(rf"^{re.escape(definition)}", file, re.MULTILINE)]
    name = f"example_of_{re.findall(r'[A-Za-z_]+', definition)[-1].lower()}"
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
