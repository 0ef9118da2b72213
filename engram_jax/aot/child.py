"""Compiles in a process of its own, which libtpu may end: what it prints becomes a report or one clear error.

python -m engram_jax.aot.child     config, topology and programs as JSON on stdin; the report on the last line
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engram_jax.aot.chips import Topology, topology
from engram_jax.config import ConfigError, RunConfig, from_dict, to_dict
from engram_jax.errors import RunError, missing_extra

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # the topology's chips are described, never opened
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two compiles at once would trip over libtpu's lock file
    "TPU_SKIP_MDS_QUERY": "1",  # nor is there a cloud to ask
    # Without these two libtpu prints errors. The slice's name decides what it describes, whatever stands here.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_LOG_DIR": "disabled",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
"""What libtpu needs to be told where there is no TPU."""


def compile_apart(
    config: RunConfig,
    where: Topology,
    programs: Sequence[str],
    keep_hlo: Path | None = None,
    detail: bool = True,
    quick: bool = False,
) -> dict[str, Any]:
    """The report of this run on these chips (report.py), by program.

    Args:
      detail: also breaks down what does not fit.
      quick: without generating code (lowering.compiled).

    Raises:
      ConfigError: the config does not fit the chips; nothing was compiled.
      RunError: the compiler refused or ended the process; the message is its own last words.
    """
    if quick and len(programs) > 1:  # a compiler that goes on would slow down the next one
        return {p: compile_apart(config, where, [p], keep_hlo, detail, quick)[p] for p in programs}
    ordered = {
        "config": to_dict(config),
        "topology": [where.libtpu, where.slices],
        "programs": list(programs),
        "detail": detail,
        "quick": quick,
        "keep_hlo": str(keep_hlo.resolve()) if keep_hlo else None,
    }
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | ENVIRONMENT
    with tempfile.TemporaryDirectory() as folder:
        ordered["answer"] = str(Path(folder) / "answer.json")
        done = subprocess.run(
            [sys.executable, "-m", "engram_jax.aot.child"],
            env=environment,
            input=json.dumps(ordered),
            capture_output=True,
            text=True,
            check=False,
        )
        answer_file = Path(ordered["answer"])
        answer = json.loads(answer_file.read_text()) if answer_file.exists() else {}
    if "config_error" in answer:
        raise ConfigError(answer["config_error"])
    if "reports" not in answer:
        raise RunError(_last_words(answer.get("error", ""), done.returncode, done.stderr))
    return answer["reports"]


def _last_words(error: str, status: int, stderr: str) -> str:
    if error:
        return f"The compiler refused: {error}"
    lines = [line for line in stderr.splitlines() if line.strip()]
    fatal = [line for line in lines if "Check failed" in line or line.startswith("F0")]
    words = (fatal or lines[-3:] or ["it said nothing"])[-3:]
    how = f"was ended by signal {-status}" if status < 0 else f"ended with {status}"
    hint = " (signal 9 is usually too little memory on this machine)" if status == -9 else ""
    return f"The compiler's process {how}{hint}: {' | '.join(word[:400] for word in words)}"


def _child(ordered: dict[str, Any]) -> dict[str, Any]:
    if importlib.util.find_spec("libtpu") is None:
        return {"config_error": f"compiling for TPUs: {missing_extra('libtpu', 'tpu')}"}
    import jax
    from jax.experimental import topologies

    from engram_jax.aot.lowering import DECODE, TooLarge, arguments, compiled, decode_arguments, lower, make_parts
    from engram_jax.aot.report import program_report, too_large_report

    config = from_dict(RunConfig, ordered["config"])
    name, slices = ordered["topology"]
    where = topology(name, slices)
    settings: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if where.chip.libtpu_config:
        settings["chip_config_name"] = where.chip.libtpu_config
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **settings).devices
    except Exception as error:  # libtpu's own
        return {"config_error": f"libtpu knows no topology {name!r}: {str(error).splitlines()[0]}"}
    reports = {}
    try:
        parts = make_parts(config, devices)
        with jax.set_mesh(parts.mesh):
            for program in ordered["programs"]:
                given = decode_arguments(parts, arguments(parts)) if program == DECODE else arguments(parts)
                try:
                    done = compiled(lower(program, parts, given), ordered["detail"], ordered["quick"])
                except TooLarge as error:
                    reports[program] = too_large_report(error, given.named(), parts, where)
                    continue
                reports[program] = program_report(program, done, given, parts, where)
                if ordered["keep_hlo"]:
                    file = Path(ordered["keep_hlo"]) / f"{config.name}-{where.name}.{program}.hlo"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(done.text)
    except ConfigError as error:
        return {"config_error": str(error)}
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error)[:2000]}
    return {"reports": reports}


if __name__ == "__main__":
    work = json.loads(sys.stdin.read())
    with contextlib.redirect_stdout(sys.stderr):
        result = _child(work)
    Path(work["answer"]).write_text(json.dumps(result))
    if work["quick"]:
        os._exit(0)
