"""Check an installed engram_jax: every module imports, and every command works on a tiny model.

Run it with the interpreter of a fresh environment that has only the wheel, from an empty folder:

    VENV/bin/python .ci/check_wheel.py

`.ci/run package` makes the environment and the folder. All files go into the current folder. The first failed check
ends the script with status 1 and the output of the command that failed.
"""

from __future__ import annotations

import importlib
import importlib.resources
import importlib.util
import json
import math
import os
import pkgutil
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NoReturn

COMMANDS = ("train", "sample", "evaluate", "compare", "export", "import", "attach")
NOT_INSTALLED = ("experiments", "tpu", "benchmarks")
"""Folders of the repository that the wheel must leave out."""
EXTRAS = ("lm_eval", "jupytext", "gcsfs")
"""Packages of the extras: absent here, so that every module is seen to import without them."""
SECONDS_PER_COMMAND = 180
STEPS = 3
SETTINGS = '''"""Two tiny models, with and without memory."""

from engram_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    EngramConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    replace,
)


def tiny() -> RunConfig:
    """A model with memory in its second block."""
    attention = AttentionConfig(
        num_attention_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=16
    )
    engram = EngramConfig(engram_layer_ids=(1,), engram_n_heads=2, engram_head_dim=8, engram_vocab_size=500)
    model = ModelConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        attention=attention,
        engram=engram,
        hc_mult=2,
        hc_sinkhorn_iters=2,
        dtype="float32",
    )
    return RunConfig(
        name="tiny",
        model=model,
        data=DataConfig(corpus={corpus!r}, seq_len=32, batch_size=4, holdout_fraction=0.2),
        optimizer=OptimizerConfig(warmup_steps=1, muon_steps=(1, 0)),
        train=TrainConfig(steps=50, log_every=1, eval_every=0, eval_batches_final=2),
        checkpoint=CheckpointConfig(every=0),
    )


def backbone() -> RunConfig:
    """The same model without memory."""
    return replace(tiny(), name="backbone", model__engram=EngramConfig())
'''


@contextmanager
def check(title: str) -> Iterator[None]:
    """Prints what is checked and the seconds it took."""
    started = time.monotonic()
    print(f"{title} ...", flush=True)
    yield
    print(f"  passed in {time.monotonic() - started:.0f} s", flush=True)


def fail(message: str) -> NoReturn:
    print(f"FAILED: {message}", file=sys.stderr, flush=True)
    sys.exit(1)


def environment() -> dict[str, str]:
    """What commands see: no path into the repository, caches in the current folder, the CPU."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    return kept | {"ENGRAM_CACHE": str(Path.cwd() / "cache"), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def cli(*arguments: object) -> str:
    """Runs the console script; returns its standard output. Any status but 0 ends this script."""
    script = shutil.which("engram-jax", path=str(Path(sys.executable).parent))
    if script is None:
        fail(f"the wheel installed no console script engram-jax into {Path(sys.executable).parent}.")
    command = [script, *map(str, arguments)]
    shown = " ".join(["engram-jax", *map(str, arguments)])
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=SECONDS_PER_COMMAND, check=False
        )
    except subprocess.TimeoutExpired as error:
        fail(f"{shown} took more than {SECONDS_PER_COMMAND} s.\n{error.stdout}\n{error.stderr}")
    print(f"  {time.monotonic() - started:3.0f} s  {shown}", flush=True)
    if done.returncode != 0:
        fail(f"{shown} ended with status {done.returncode}.\n{done.stdout}\n{done.stderr}")
    return done.stdout


def check_installation() -> None:
    """The package lies in the environment, is typed, and brings no other folder of the repository."""
    import engram_jax

    folder = Path(str(engram_jax.__file__)).parent
    if not folder.is_relative_to(sys.prefix):
        fail(f"engram_jax was imported from {folder}, not from the environment {sys.prefix}.")
    if not importlib.resources.files(engram_jax).joinpath("py.typed").is_file():
        fail("the wheel has no engram_jax/py.typed, so type checkers ignore its annotations.")
    for name in NOT_INSTALLED:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        fail(f"import {name} works: the wheel must contain engram_jax alone.")


def check_imports() -> None:
    """Every module imports in an environment without extras."""
    import engram_jax

    present = [name for name in EXTRAS if importlib.util.find_spec(name)]
    if present:
        fail(f"{present} are installed. Use an environment that has the wheel without extras.")

    broken: dict[str, str] = {}

    def note(name: str) -> None:  # walk_packages calls it in the handler of the error
        broken[name] = traceback.format_exc()

    names = [module.name for module in pkgutil.walk_packages(engram_jax.__path__, "engram_jax.", onerror=note)]
    for name in names:
        if name.rpartition(".")[2] == "__main__":
            continue
        try:
            importlib.import_module(name)
        except Exception:
            note(name)
    if broken:
        fail(f"{len(broken)} of {len(names)} modules do not import: {', '.join(broken)}\n" + "\n".join(broken.values()))
    print(f"  {len(names)} modules")


def check_help() -> None:
    """`engram-jax --help` names every command, and every command has its own help."""
    from engram_jax.commands.main import SUBCOMMANDS

    overview = cli("--help")
    names = sorted({*COMMANDS, *SUBCOMMANDS})
    missing = [name for name in names if name not in overview]
    if missing:
        fail(f"engram-jax --help does not name {missing}:\n{overview}")
    with ThreadPoolExecutor(2) as pool:
        pages = list(pool.map(lambda name: cli(name, "--help"), names))
    for name, page in zip(names, pages, strict=True):
        if len(page.strip()) < 40:
            fail(f"engram-jax {name} --help prints almost nothing: {page!r}")


def write_inputs() -> Path:
    """A corpus of 120 short documents, and my_run.py, which trains on it; returns the path of my_run.py."""
    random = Random(0)
    words = ["".join(random.choices("abcdefghijklmnoprstuv", k=random.randint(2, 7))) for _ in range(200)]
    corpus = Path.cwd() / "corpus"
    corpus.mkdir()
    for i in range(120):
        text = " ".join(random.choices(words, k=random.randint(20, 60)))
        (corpus / f"{i:03d}.txt").write_text(f"{i} {text}\n")
    settings = Path("my_run.py")
    settings.write_text(SETTINGS.replace("{corpus!r}", repr(str(corpus))))
    return settings


def check_files(folder: str, *names: str) -> None:
    """Each name, or pattern, is a file in the folder."""
    for name in names:
        if not any(path.is_file() for path in Path(folder).glob(name)):
            found = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))[:40]
            fail(f"{folder} has no {name}. It has: {found}")


def check_result(run_dir: str, steps: int) -> None:
    """The run ended at the given step with a finite loss."""
    check_files(run_dir, "config.json", "tokenizer.json", "metrics.jsonl", "result.json")
    result = json.loads(Path(run_dir, "result.json").read_text())
    if result["step"] != steps or not math.isfinite(result["loss"]):
        fail(f"{run_dir}/result.json: step {result['step']}, loss {result['loss']}; expected {steps} steps.")


def check_commands() -> None:
    """Train, sample, evaluate, export, import, attach and compare, as a user would."""
    settings = write_inputs()
    few = ("--train.steps", STEPS)
    printed = cli("train", f"{settings}:tiny", *few, "--print")
    if f'"steps": {STEPS}' not in printed:
        fail(f"engram-jax train --print does not show the overridden field train.steps:\n{printed}")
    for name in ("tiny", "backbone"):
        cli("train", f"{settings}:{name}", *few, "--run_dir", f"runs/{name}")
        check_result(f"runs/{name}", STEPS)

    prompt = ("abc", "--max_tokens", 5, "--temperature", 0)
    sampled = cli("sample", "runs/tiny", *prompt)
    if not sampled.startswith("abc"):
        fail(f"engram-jax sample does not begin with its prompt: {sampled!r}")
    table = cli("evaluate", "runs/tiny")
    if not table.strip():
        fail("engram-jax evaluate printed no table.")
    check_files("runs/tiny", "evaluations/*.json")

    cli("export", "runs/tiny", "exported")
    check_files("exported", "config.json", "tokenizer.json", "*.safetensors")
    cli("import", "exported", "runs/imported")
    if (again := cli("sample", "runs/imported", *prompt)) != sampled:
        fail(f"the run continues its prompt with {sampled!r}, after export and import with {again!r}.")

    cli("attach", "runs/backbone", "attached", "--train.steps", 2, "--run_dir", "runs/attached")
    check_result("runs/attached", 2)
    cli("compare", "runs/backbone", "runs/tiny")
    check_files("runs", "compare.png", "compare.md")


def main() -> None:
    if any(Path.cwd().iterdir()):
        fail(f"{Path.cwd()} is not empty: start this script in an empty folder.")
    started = time.monotonic()
    with check("Installed files"):
        check_installation()
    with check("Every module imports without extras"):
        check_imports()
    with check("Help of every command"):
        check_help()
    with check("Every command on a tiny model"):
        check_commands()
    print(f"The wheel passed all checks in {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
