"""Readers of SQuAD's and HotpotQA's JSON, the question sets of RULER's question answering."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engram_jax.config import ConfigError, require


class Question(NamedTuple):
    text: str
    answers: tuple[str, ...]
    """Any of them is right."""
    documents: tuple[int, ...]
    """Documents that hold the answer: indices into `QuestionSet.documents`."""
    related: tuple[int, ...] = ()
    """Other documents of the same article, which distract first."""


@dataclass(frozen=True)
class QuestionSet:
    documents: tuple[str, ...]
    questions: tuple[Question, ...]


def read_squad(path: str | Path) -> QuestionSet:
    """SQuAD 1.1 or 2.0 (`dev-v2.0.json`); questions without an answer are left out.

    Raises:
      ConfigError: unreadable, of another form, or without questions.
    """

    def read(content: Any) -> QuestionSet:
        articles = [article["paragraphs"] for article in content["data"]]
        documents, index_of = _numbered(paragraph["context"] for article in articles for paragraph in article)
        questions = []
        for article in articles:
            of_article = dict.fromkeys(index_of[paragraph["context"]] for paragraph in article)
            for paragraph in article:
                own = index_of[paragraph["context"]]
                related = tuple(index for index in of_article if index != own)
                questions += [
                    Question(qa["question"], tuple(answer["text"] for answer in qa["answers"]), (own,), related)
                    for qa in paragraph["qas"]
                    if qa["answers"] and not qa.get("is_impossible", False)
                ]
        return QuestionSet(documents, tuple(questions))

    return _read(path, "ruler.squad", "SQuAD", read)


def read_hotpot(path: str | Path) -> QuestionSet:
    """HotpotQA (`hotpot_dev_distractor_v1.json`): all passages of a question count as its documents.

    Raises:
      ConfigError: unreadable, of another form, or without questions.
    """

    def read(content: Any) -> QuestionSet:
        passages = {id(entry): [f"{title}\n{''.join(lines)}" for title, lines in entry["context"]] for entry in content}
        documents, index_of = _numbered(passage for own in passages.values() for passage in own)
        questions = [
            Question(entry["question"], (entry["answer"],), tuple(index_of[p] for p in passages[id(entry)]))
            for entry in content
        ]
        return QuestionSet(documents, tuple(questions))

    return _read(path, "ruler.hotpot", "HotpotQA", read)


def _numbered(documents) -> tuple[tuple[str, ...], dict[str, int]]:
    """The different documents in order, and the index of each."""
    different = tuple(dict.fromkeys(documents))
    return different, {document: index for index, document in enumerate(different)}


def _read(path: str | Path, field: str, form: str, read) -> QuestionSet:
    try:
        questions = read(json.loads(Path(path).expanduser().read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{field}={str(path)!r}: cannot read it: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{field}={str(path)!r} is not {form}'s JSON: {error!r}.") from error
    require(bool(questions.questions), f"{field}={str(path)!r} has no question with an answer.")
    return questions
