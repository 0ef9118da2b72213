"""Where a run's numbers go: metrics.jsonl, TensorBoard and the progress line."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tensorboardX import SummaryWriter


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard. Lines after `step` (of a run that was cut off) are dropped first.

    Every process has one, and that of process 0 `writes`.
    """

    def __init__(self, run_dir: Path, step: int, tensorboard: bool, writes: bool = True):
        self._path = self._board = None
        if not writes:
            return
        self._path = path = run_dir / "metrics.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1) if tensorboard else None

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._path:
            with self._path.open("a") as file:  # closed at once: mounted buckets lose what a lost machine had open
                file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._board:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in _whole_lines(run_dir / "metrics.jsonl")]


def _whole_lines(path: Path) -> list[str]:
    """The file's lines without a last one that a crash cut short."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


class Progress:
    """`step 120/400  loss 3.412  4,812 tok/s  ETA 1m10s`, from the steps since the last line."""

    def __init__(self, start_step: int, total_steps: int, tokens_per_step: int):
        self.total, self.tokens_per_step = total_steps, tokens_per_step
        self._step, self._time = start_step, time.perf_counter()

    def tokens_per_second(self, step: int) -> float:
        """Since the last call, evaluation and checkpoint time left out by `pause`."""
        now = time.perf_counter()
        rate = (step - self._step) * self.tokens_per_step / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return rate

    def pause(self, seconds: float) -> None:
        self._time += seconds

    def line(self, step: int, values: dict[str, float], tokens_per_second: float) -> str:
        left = (self.total - step) * self.tokens_per_step / max(tokens_per_second, 1e-9)
        return (
            f"step {step:>{len(str(self.total))}}/{self.total}  loss {values['loss']:.4f}  "
            f"{tokens_per_second:,.0f} tok/s  ETA {duration(left)}  "
            f"lr {values['learning_rate']:.2e}  grad {values['grad_norm']:.2f}"
        )


def duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
