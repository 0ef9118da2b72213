"""The command of the supervisor: `python -m tpu.child RUN ...` is `python -m experiments.run RUN ...` with profiling.

A thread beside the run waits for `python -m tpu.child --profile SECONDS` on the same machine. It then traces the run
for that time into ~/.engram_jax/profile, in TensorBoard's format. Without such a request nothing is traced or slowed.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
import threading
import time
from pathlib import Path


class Requests:
    def __init__(self, folder: Path | None = None):
        folder = folder or Path.home() / ".engram_jax"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.asked, self.answered, self.trace = folder / "profile.ask", folder / "profile.done", folder / "profile"

    def ask(self, seconds: float, patience: float = 120) -> int:
        """Asks the run for a trace, and waits for it; returns the exit status."""
        shutil.rmtree(self.trace, ignore_errors=True)
        self.answered.unlink(missing_ok=True)
        _write(self.asked, json.dumps(seconds))
        until = time.monotonic() + seconds + patience
        while not self.answered.exists():
            if time.monotonic() > until:
                self.asked.unlink(missing_ok=True)
                print("error: no run answered. Is a run going on here that has found its devices?", file=sys.stderr)
                return 1
            time.sleep(0.1)
        answer = self.answered.read_text()
        print(answer or f"traced {seconds:g} s into {self.trace}", file=sys.stderr if answer else sys.stdout)
        return 1 if answer else 0

    def serve(self, every: float = 1.0) -> None:
        while True:
            if self.asked.exists() and _backends_exist():
                self.answer()
            time.sleep(every)

    def answer(self) -> None:
        import jax

        seconds = json.loads(self.asked.read_text())
        self.asked.unlink()
        message = ""
        try:
            with jax.profiler.trace(str(self.trace)):
                time.sleep(seconds)
        except Exception as error:  # an error of the profiler must not end the run
            message = f"error: {error}"
        _write(self.answered, message)


def _write(file: Path, text: str) -> None:
    """Writes the file in one step, so that a waiting reader never sees a part of it."""
    whole = file.with_suffix(".new")
    whole.write_text(text)
    whole.replace(file)


def _backends_exist() -> bool:
    """Whether the run has found its devices. An earlier trace would keep the run from joining the other hosts."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return getattr(bridge, "backends_are_initialized", lambda: False)()  # the module may be half imported


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--profile"]:
        return Requests().ask(float(arguments[1]))
    threading.Thread(target=Requests().serve, daemon=True).start()
    sys.argv = ["python -m experiments.run", *arguments]
    runpy.run_module("experiments.run", run_name="__main__", alter_sys=True)  # exits with the run's own status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
