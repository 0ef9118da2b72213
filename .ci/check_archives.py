"""Check what `uv build` wrote: the wheel holds engram_jax alone, the sdist holds all that a rebuild needs.

    python .ci/check_archives.py DIST [--tag v0.1.0]

DIST holds one wheel and one sdist. With --tag their version must be the tag's. Needs only the standard library.
"""

from __future__ import annotations

import argparse
import email
import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "engram_jax"
SDIST_FILES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO")
CACHES = {"__pycache__", ".git", ".venv", ".venv-newest", ".pytest_cache", ".ruff_cache", ".hypothesis"}
"""Folders that must not be in an sdist at any depth."""
RESULTS = {"runs", "studies", "build", "dist", "compile", "site"}
"""Folders that must not be in an sdist's root: what commands write there."""


def only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder} must hold exactly one {pattern}; it holds {[path.name for path in found]}.")
    return found[0]


def package_files(root: Path) -> set[str]:
    """Files of the package in the checkout, relative to it."""
    files = (path for path in (root / PACKAGE).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix() for path in files if "__pycache__" not in path.parts}


def check_wheel(path: Path, expected: set[str]) -> tuple[list[str], str]:
    """Errors of the wheel, and its version."""
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        information = {name.split("/")[0] for name in names if name.split("/")[0].endswith(".dist-info")}
        if len(information) != 1:
            return [f"{path.name} has {len(information)} .dist-info folders."], ""
        (folder,) = information
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        scripts = archive.read(f"{folder}/entry_points.txt").decode() if f"{folder}/entry_points.txt" in names else ""
    errors = []
    if others := sorted({name.split("/")[0] for name in names} - {PACKAGE, folder}):
        errors.append(f"{path.name} installs {others} beside {PACKAGE}.")
    inside = {name for name in names if name.startswith(f"{PACKAGE}/")}
    if missing := sorted(expected - inside):
        errors.append(f"{path.name} lacks {missing}.")
    if extra := sorted(inside - expected):
        errors.append(f"{path.name} has files that the checkout lacks: {extra}.")
    if "engram-jax" not in scripts:
        errors.append(f"{path.name} has no console script engram-jax: set [project.scripts].")
    for field in ("Name", "Version", "Summary", "Requires-Python", "License-Expression"):
        if not metadata[field]:
            errors.append(f"{path.name} has no {field} in its metadata.")
    if not str(metadata.get_payload()).strip():
        errors.append(f"{path.name} has no long description.")
    return errors, str(metadata["Version"])


def check_sdist(path: Path, expected: set[str]) -> list[str]:
    """Errors of the sdist."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}  # without the leading engram_jax-VERSION/
    errors = []
    if missing := sorted((expected | set(SDIST_FILES)) - names):
        errors.append(f"{path.name} lacks {missing}.")
    paths = {name: name.split("/") for name in names}
    if unwanted := sorted(name for name, parts in paths.items() if CACHES & set(parts) or parts[0] in RESULTS):
        errors.append(f"{path.name} has files that do not belong there: {unwanted[:20]}.")
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the archives that uv build wrote.")
    parser.add_argument("dist", type=Path)
    parser.add_argument("--tag", default="", help="the release's tag; empty: no release")
    options = parser.parse_args()

    wheel, sdist = only(options.dist, "*.whl"), only(options.dist, "*.tar.gz")
    expected = package_files(ROOT)
    errors, version = check_wheel(wheel, expected)
    errors += check_sdist(sdist, expected)
    citation = re.search(r"^version: *(\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if citation is None or citation[1].strip("\"'") != version:
        errors.append(f"CITATION.cff must say version: {version}, which is the package's.")
    if options.tag and options.tag != f"v{version}":
        errors.append(f"the tag is {options.tag}, but the package's version is {version}: tag v{version}.")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if not errors:
        print(f"{wheel.name} ({len(expected)} files) and {sdist.name}: good")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
