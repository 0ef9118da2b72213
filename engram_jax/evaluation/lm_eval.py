"""The command line of lm-evaluation-harness, with trained runs as its model `engram_jax`:

    python -m engram_jax.evaluation.lm_eval --model engram_jax --model_args run_dir=RUN_DIR --tasks hellaswag

All options of the harness work (`--help`), such as --include_path for tasks on disk. The harness finds models only in
its own package, so this program registers ours first. Model arguments: run_dir, max_length (default: the trained
context), batch_tokens, memory_scale, seed.
"""

from __future__ import annotations

import importlib.util
import sys

from engram_jax.config import ConfigError
from engram_jax.errors import RunError
from engram_jax.evaluation.lm_eval_task import MISSING


def main() -> int:
    """Runs the harness; returns the exit status: 2 after a mistake in the arguments, 1 if the run cannot be read."""
    if importlib.util.find_spec("lm_eval") is None:
        print(f"error: {MISSING}", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    import engram_jax.evaluation.lm_eval_model  # noqa: F401  (registers the model)

    try:
        cli_evaluate()
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
