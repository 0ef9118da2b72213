"""Question answering: RULER's tasks qa_1 (SQuAD) and qa_2 (HotpotQA), with the answer's documents among others.

Without a file of questions, the questions are made from facts about invented people and towns, each fact in one
document. qa_1 asks for a fact of one document, qa_2 for a fact that needs two. They are easier than SQuAD and HotpotQA,
since every answer is a literal copy; the scores do not compare.
"""

from __future__ import annotations

from random import Random

from engram_jax.evaluation.ruler.items import Draft, Family
from engram_jax.evaluation.ruler.question_files import QuestionSet
from engram_jax.evaluation.ruler.words import Texts, different, made_up_word

TRADES = ("baker", "carpenter", "doctor", "farmer", "painter", "sailor", "tailor", "teacher", "weaver", "watchmaker")


def one_document(rng: Random, size: int, length: int, texts: Texts) -> Draft:
    """A question about one document. `size`: distracting documents."""
    if texts.squad:
        return from_set(rng, size, texts.squad)
    town, person, others = invented(rng, size)
    question, answer = rng.choice(
        [
            (f"In which town was {person['name']} born?", person["town"]),
            (f"In which year was {person['name']} born?", person["year"]),
            (f"On which river does {town['name']} lie?", town["river"]),
            (f"Who founded {town['name']}?", town["founder"]),
        ]
    )
    return among(rng, question, (answer,), [describe(person if person["name"] in question else town)], others)


def two_documents(rng: Random, size: int, length: int, texts: Texts) -> Draft:
    """A question that needs two documents. `size`: distracting documents."""
    if texts.hotpot:
        return from_set(rng, size, texts.hotpot)
    town, person, others = invented(rng, size)
    question, answer = rng.choice(
        [
            (f"On which river does the town lie where {person['name']} was born?", town["river"]),
            (f"Who founded the town where {person['name']} was born?", town["founder"]),
        ]
    )
    return among(rng, question, (answer,), [describe(person), describe(town)], others)


def from_set(rng: Random, size: int, questions: QuestionSet) -> Draft:
    """A question of the set. Documents of the same article distract first, then any document, as in RULER."""
    chosen = rng.choice(questions.questions)
    related = rng.sample(chosen.related, min(size, len(chosen.related)))
    taken = {*chosen.documents, *chosen.related}
    rest = [i for i in range(len(questions.documents)) if i not in taken]
    others = related + rng.sample(rest, min(size - len(related), len(rest)))
    documents, others = ([questions.documents[i] for i in indices] for indices in (chosen.documents, others))
    return among(rng, chosen.text, chosen.answers, documents, others)


def among(rng: Random, question: str, answers: tuple[str, ...], documents: list[str], others: list[str]) -> Draft:
    shuffled = documents + others
    rng.shuffle(shuffled)
    context = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(shuffled, start=1))
    instruction = "Answer the question from the documents {}. Write the answer and nothing else."
    return Draft(
        input=(
            f"{instruction.format('that follow')}\n\n{context}\n\n{instruction.format('above')}\n\nQuestion: {question}"
        ),
        answer_prefix="\nAnswer:",
        outputs=answers,
    )


def invented(rng: Random, size: int) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """A town, a person born there, and `size` documents about other towns and people."""
    names = iter(different(lambda: made_up_word(rng).capitalize(), 3 * size + 8))
    own = _town(rng, names)
    person = _person(rng, names, own["name"])
    towns = [_town(rng, names) for _ in range((size + 1) // 2)]
    people = [_person(rng, names, rng.choice(towns)["name"]) for _ in range(size // 2)]
    return own, person, [describe(document) for document in towns + people]


def _town(rng: Random, names) -> dict[str, str]:
    return {
        "name": next(names),
        "river": next(names),
        "founder": f"{next(names)} the {rng.choice(TRADES)}",
        "year": str(rng.randrange(1200, 1600)),
    }


def _person(rng: Random, names, town: str) -> dict[str, str]:
    name = f"{next(names)} {next(names)}"
    return {"name": name, "town": town, "year": str(rng.randrange(1700, 1990)), "trade": rng.choice(TRADES)}


def describe(about: dict[str, str]) -> str:
    if "river" in about:
        return (
            f"{about['name']}\n{about['name']} is a town on the river {about['river']}. "
            f"It was founded in {about['year']} by {about['founder']}."
        )
    return (
        f"{about['name']}\n{about['name']} was born in {about['year']} in the town of {about['town']} "
        f"and worked there as a {about['trade']}."
    )


FAMILIES = (
    Family("qa_1", "qa", 32, one_document, "part", largest=lambda texts: texts.squad and len(texts.squad.documents)),
    Family("qa_2", "qa", 32, two_documents, "part", largest=lambda texts: texts.hotpot and len(texts.hotpot.documents)),
)
