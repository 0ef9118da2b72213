"""A trained run loaded from its folder, for sampling, evaluation, analysis and export."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from engram_jax.config import RunConfig, replace, require
from engram_jax.data.tokenizer import load_tokenizer
from engram_jax.errors import RunError
from engram_jax.memory.placements import in_program_placements
from engram_jax.registries import PLACEMENTS
from engram_jax.runs.checkpoint import Checkpoints
from engram_jax.runs.parts import Parts, assemble
from engram_jax.runs.run_folder import check_readable
from engram_jax.runs.settings import read_config
from engram_jax.runs.state import TrainState
from engram_jax.sharding import BATCH, MESH_AXES


def load_run(
    run_dir: Path | str,
    log: Callable[[str], None] = print,
    tables: bool = True,
    *,
    mesh: Mapping[str, int] | None = None,
    placement: str = "",
) -> tuple[TrainState, Parts]:
    """A trained run's newest state and parts, without its corpus: for sampling and analysis.

        state, parts = load_run("runs/engram_tiny")
        engine = Engine(parts, state)

    Args:
      log: gets a line about the checkpoint.
      tables: False leaves the tables on the disk, in `tables_of(run_dir, step)`.
      mesh: devices on the mesh axes, `{"tensor": 4}`; the first devices are taken. None: one device.
      placement: the memory that holds the tables, see `for_use`. Empty: as in training.

    Raises:
      ConfigError: the mesh does not fit the model or the devices.
      RunError: the folder is not a run, has no checkpoint, or another tokenizer than it was trained with.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    tokenizer, num_devices = load_tokenizer(run_dir / "tokenizer.json"), math.prod((mesh or {}).values())
    parts = assemble(for_use(config, mesh, placement), tokenizer.backend, jax.devices()[:num_devices])
    with (
        jax.set_mesh(parts.mesh),
        Checkpoints(run_dir / "checkpoints", config.checkpoint, parts, log, read_only=True) as checkpoints,
    ):

        def can_be_read(saved: dict[str, Any]) -> None:
            if saved.get("vocab_sha256", tokenizer.vocab_sha256) != tokenizer.vocab_sha256:
                raise RunError(f"{run_dir}/tokenizer.json is not the tokenizer this run was trained with: restore it.")
            check_readable(saved, parts)

        state = checkpoints.restore(parts.abstract_state(), can_be_read, tables)
    if state is None:
        raise RunError(f"{run_dir} has no checkpoint yet: let the run reach its first one.")
    return state, parts


def on_one_device(config: RunConfig) -> RunConfig:
    """The same run for sampling, analysis and interchange, whatever it was trained on."""
    return for_use(config)


def for_use(config: RunConfig, mesh: Mapping[str, int] | None = None, placement: str = "") -> RunConfig:
    """The same run for whole programs without a trainer, on other devices than it was trained on.

    Args:
      mesh: devices on the mesh axes, `{"tensor": 4}`. None: one device.
      placement: which memory holds the tables, a name in `registries.PLACEMENTS` whose tables programs can reach.
        Empty: as in training, or the placement that the training placement names for this (`serving_placement`).

    Raises:
      ConfigError: there is no such placement, or programs cannot reach its tables.
    """
    placement = placement or PLACEMENTS[config.memory.placement].serving_placement or config.memory.placement
    require(
        PLACEMENTS[placement].in_program,
        f"memory.placement={placement}: a program without a trainer cannot reach these tables. Choose one of "
        f"{', '.join(in_program_placements())}.",
    )
    sizes = dict.fromkeys(MESH_AXES, 1) | dict(mesh or {})
    return replace(
        config,
        **{f"train__mesh_{axis}": size for axis, size in sizes.items()},
        train__grad_accum=1,
        data__batch_size=math.prod(sizes[axis] for axis in BATCH),
        memory__placement=placement,
        memory__mmap_dir="",
    )


def tables_of(run_dir: Path, step: int) -> Path:
    """The folder with one table (memory/table_files.py) per Engram layer of a run's checkpoint."""
    return run_dir / "checkpoints" / str(step) / "tables"


def has_checkpoint(run_dir: Path) -> bool:
    return any(path.name.isdigit() for path in (run_dir / "checkpoints").glob("*"))
