"""RULER's files of items: one JSON object a line, with index, input, outputs and length.

RULER's scripts write DATA/FAMILY/validation.jsonl, and add `pred`, the prediction, for their own scoring script.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from engram_jax.config import ConfigError, require
from engram_jax.data.tokenizer import Tokenizer
from engram_jax.evaluation.ruler.items import Family, Item, answer_budget
from engram_jax.files import write_text


def read_items(folder: Path, family: Family, tokenizer: Tokenizer, limit: int) -> list[Item]:
    """The first `limit` items of FOLDER/FAMILY/validation.jsonl, with lengths counted by the run's tokenizer.

    Raises:
      ConfigError: the file is missing or holds something else.
    """
    path = folder / family.name / "validation.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"ruler.data={str(folder)!r}: cannot read {path}: {error.strerror}.") from error
    items = []
    for number, line in enumerate(lines[:limit], start=1):
        try:
            values = json.loads(line)
            text, outputs = values["input"], tuple(values["outputs"])
            require(len(outputs) > 0, f"ruler.data: {path}, line {number} has no outputs.")
            prefix = values.get("answer_prefix", "")
            budget = answer_budget(family, tokenizer, outputs)
            length = 1 + len(tokenizer.encode(text + prefix)) + budget
            items.append(Item(values.get("index", number - 1), text, prefix, outputs, length, budget))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"ruler.data: {path}, line {number} is not a RULER item: {error!r}.") from error
    require(bool(items), f"ruler.data: {path} is empty.")
    return items


def write_items(path: Path, items: Sequence[Item], predictions: Sequence[str]) -> None:
    """Writes items with their predictions, atomically."""
    lines = []
    for item, prediction in zip(items, predictions, strict=True):
        values = {
            "index": item.index,
            "input": item.input,
            "answer_prefix": item.answer_prefix,
            "outputs": item.outputs,
            "length": item.length,
            "tokens_to_generate": item.tokens_to_generate,
            "pred": prediction,
        }
        lines.append(json.dumps(values) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(lines))
