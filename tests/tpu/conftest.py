"""Every test here has a fake gcloud, and no way to a real one."""

import shutil
import sys
from pathlib import Path

import pytest
from tpu_fakes import Cloud

import tpu.work

TOOLS = ["sh", "git", "gzip", "tar", "mkdir", "rm", "rmdir", "ln", "grep", "tail", "env", "chmod", "ls", "cat", "sleep"]
TOOLS += ["hostname", "mv"]

# What a worker has. A mount is a line in the file mounts; its folder is replaced by a link to FAKE_GCLOUD/buckets/NAME,
# and that of a dead one by a link to nowhere. All are called as the real ones are, and write down how.
WORKER = {
    "gcsfuse": """
        for at; do bucket=$last; last=$at; done
        test -d "$at" || { echo "gcsfuse: no folder $at"; exit 1; }
        if test -e "$FAKE_GCLOUD"/refuse; then echo "unknown flag or 403"; exit 1; fi
        mkdir -p "$FAKE_GCLOUD"/buckets/"$bucket"; rmdir "$at"; ln -s "$FAKE_GCLOUD"/buckets/"$bucket" "$at"
        echo "$at" >> "$FAKE_GCLOUD"/mounts""",
    "mountpoint": """test "$1" = -q; grep -qxF -- "$2" "$FAKE_GCLOUD"/mounts && test -d "$2" """,
    "fusermount": """test "$1 $2" = "-u -z" && grep -qxF -- "$3" "$FAKE_GCLOUD"/mounts || exit 1; rm "$3"
        lines=$(grep -vxF -- "$3" "$FAKE_GCLOUD"/mounts); echo "$lines" > "$FAKE_GCLOUD"/mounts""",
    # runs nothing
    "sudo": """case "$*" in *"install -y gcsfuse") mv "$FAKE_GCLOUD"/gcsfuse "$FAKE_GCLOUD"/bin/;; esac""",
    "curl": "echo key",
}


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cloud:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    gcloud = tools / "gcloud"
    gcloud.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {Path(__file__).with_name("fake_gcloud.py")} "$@"\n')
    gcloud.chmod(0o755)
    for name, does in WORKER.items():
        tool = tools / name
        tool.write_text(f'#!/bin/sh\necho {name} "$*" >> "$FAKE_GCLOUD"/worker.log\n{does}\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("FAKE_GCLOUD", str(tmp_path))
    # Should a real one be started in spite of all: it finds neither an account nor a metadata server.
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("CLOUDSDK_CORE_CHECK_GCE_METADATA", "false")
    assert shutil.which("gcloud") == str(gcloud)
    return Cloud(tmp_path, lambda: tuple(capfd.readouterr()))


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the look of the run command at its arguments, which takes two seconds; one test takes it."""
    monkeypatch.setattr(tpu.work, "check_run", lambda run, overrides: None)
