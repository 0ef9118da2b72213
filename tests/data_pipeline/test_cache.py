import errno
import threading
import time

import pytest

from engram_jax.config import ConfigError, DataConfig
from engram_jax.data.cache import build_once, cache_key, cache_root


def test_racing_builders_build_once(tmp_path):
    built, lines, seen = [], [], []

    def build(path):
        built.append(path)
        path.mkdir()
        time.sleep(0.1)
        (path / "whole").write_text("x")

    def race():
        path = build_once(tmp_path / "a" / "made", lambda p: p.is_dir(), build, lines.append)
        seen.append((path / "whole").read_text())

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and seen == ["x"] * 4
    assert all("Another process is building" in line for line in lines)


def test_a_builder_that_died_leaves_nothing_behind(tmp_path):
    def die(path):
        path.mkdir()
        (path / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "made", lambda p: p.is_dir(), die)
    assert not (tmp_path / "made").exists()
    build_once(tmp_path / "made", lambda p: p.is_dir(), lambda p: p.mkdir())
    assert list((tmp_path / "made").iterdir()) == []


def test_an_incomplete_result_is_replaced(tmp_path):
    (tmp_path / "made").write_text("half")
    build_once(tmp_path / "made", lambda p: p.is_file() and p.read_text() == "whole", lambda p: p.write_text("whole"))
    assert (tmp_path / "made").read_text() == "whole"


def test_a_full_disk_is_one_clear_message(tmp_path):
    def build(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(
        ConfigError, match=r"data.cache_dir: cannot write .*made.*No space left on device.*data.cache_dir"
    ):
        build_once(tmp_path / "made", lambda p: p.is_file(), build)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir: cannot write"):
        build_once(tmp_path / "file" / "made", lambda p: p.is_file(), build)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "environment"))
    assert cache_root(DataConfig()) == tmp_path / "environment"
    assert cache_root(DataConfig(cache_dir=str(tmp_path))) == tmp_path
    monkeypatch.delenv("ENGRAM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root(DataConfig()) == tmp_path / ".cache" / "engram_jax"


def test_keys_tell_settings_apart():
    keys = {cache_key(a=1, b=2), cache_key(b=2, a=1), cache_key(a=2, b=1), cache_key(a=1)}
    assert len(keys) == 3
