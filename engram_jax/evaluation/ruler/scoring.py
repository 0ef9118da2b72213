"""RULER's two scores, in percent, as its scripts/eval/synthetic/constants.py defines them."""

from __future__ import annotations

import re
from collections.abc import Sequence

CONTROL = re.compile(r"[\x00-\x1f]")


def cleaned(prediction: str) -> str:
    """The prediction without white space around it, and with line breaks for control characters."""
    return CONTROL.sub("\n", prediction.strip()).strip()


def string_match_all(prediction: str, outputs: Sequence[str]) -> float:
    """Percent of the answers that occur in the prediction, in any case."""
    found = [answer.lower() in cleaned(prediction).lower() for answer in outputs]
    return 100 * sum(found) / len(found)


def string_match_part(prediction: str, outputs: Sequence[str]) -> float:
    """100 if one of the answers occurs in the prediction, in any case; else 0."""
    return 100.0 * any(answer.lower() in cleaned(prediction).lower() for answer in outputs)


SCORES = {"all": string_match_all, "part": string_match_part}
