"""metrics.jsonl across a crash, TensorBoard files read back, the progress line."""

import json
import time

import pytest

from engram_jax.training import metrics
from engram_jax.training.metrics import MetricsWriter, Progress, duration, read_metrics


def write_steps(run_dir, start, stop, tensorboard=False):
    with MetricsWriter(run_dir, start, tensorboard) as writer:
        for step in range(start + 1, stop + 1):
            writer.write(step, {"loss": 10.0 / step})


def test_lines_are_read_back(tmp_path):
    assert read_metrics(tmp_path) == []
    write_steps(tmp_path, 0, 3)
    assert read_metrics(tmp_path) == [{"step": s, "loss": 10.0 / s} for s in (1, 2, 3)]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with MetricsWriter(tmp_path, 0, tensorboard=False) as writer:
        writer.write(1, {"loss": 2.0})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    write_steps(tmp_path, 0, 7)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 8, "lo')  # cut short by the crash
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    write_steps(tmp_path, 4, 6)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_reads_the_files(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_steps(tmp_path, 0, 5, tensorboard=True)
    time.sleep(1.1)  # the files' names hold the second in which they were begun
    write_steps(tmp_path, 3, 6, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = {event.step: event.value for event in events.Scalars("loss")}
    assert list(scalars) == [1, 2, 3, 4, 5, 6]
    assert scalars == pytest.approx({step: 10.0 / step for step in range(1, 7)})


def test_tensorboard_is_optional(tmp_path):
    write_steps(tmp_path, 0, 1)
    assert not (tmp_path / "tensorboard").exists()


def test_progress_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    progress = Progress(start_step=10, total_steps=40, tokens_per_step=1000)
    now[0] = 107.0
    progress.pause(2.0)
    assert progress.tokens_per_second(20) == pytest.approx(10 * 1000 / 5)
    now[0] = 109.0
    rate = progress.tokens_per_second(25)
    assert rate == pytest.approx(5 * 1000 / 2)
    line = progress.line(25, {"loss": 3.41234, "learning_rate": 1e-3, "grad_norm": 0.5}, rate)
    assert line == "step 25/40  loss 3.4123  2,500 tok/s  ETA 6s  lr 1.00e-03  grad 0.50"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (70, "1m10s"),
        (3599.7, "1h00m"),
        (3600, "1h00m"),
        (90_061, "25h01m"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
