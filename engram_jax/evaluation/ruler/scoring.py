"""RULER's two scores, in percent, as its scripts/eval/synthetic/constants.py defines them."""

from __future__ import annotations

import re
from collections.abc import Sequence

CONTROL = re.compile(r"[\x00-\x1f]")


def cleaned(prediction: str) -> str:
    """Stripped, control characters as line breaks, stripped again."""
    return CONTROL.sub("\n", prediction.strip()).strip()


def string_match_all(prediction: str, outputs: Sequence[str]) -> float:
    """Share of the answers that occur in the prediction, whatever their case."""
    found = [answer.lower() in cleaned(prediction).lower() for answer in outputs]
    return 100 * sum(found) / len(found)


def string_match_part(prediction: str, outputs: Sequence[str]) -> float:
    """100 if any of the answers occurs in the prediction, whatever its case."""
    return 100.0 * any(answer.lower() in cleaned(prediction).lower() for answer in outputs)


SCORES = {"all": string_match_all, "part": string_match_part}
