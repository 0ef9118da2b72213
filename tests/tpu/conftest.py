"""Every test here has a fake gcloud, and no way to a real one."""

import shutil
import sys
from pathlib import Path

import pytest
from tpu_fakes import Cloud

import tpu.work

TOOLS = ["sh", "git", "gzip", "tar", "mkdir", "rm", "ln", "grep", "tail", "env", "chmod", "ls", "cat", "sleep"]


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cloud:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    gcloud = tools / "gcloud"
    gcloud.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {Path(__file__).with_name("fake_gcloud.py")} "$@"\n')
    gcloud.chmod(0o755)
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
