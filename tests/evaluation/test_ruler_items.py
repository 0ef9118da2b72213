"""RULER's items: solved by reading them, counted by hand, never longer than asked."""

import json
import re
from collections import Counter
from random import Random

import numpy as np
import pytest
from seeds import rng_of

from engram_jax.config import ConfigError
from engram_jax.data.tokenizer import train_tokenizer
from engram_jax.evaluation.ruler.families import FAMILIES, GROUPS, chosen
from engram_jax.evaluation.ruler.items import DoesNotFitError, make_items
from engram_jax.evaluation.ruler.needles import Needles, at_depths, at_random
from engram_jax.evaluation.ruler.question_files import read_hotpot, read_squad
from engram_jax.evaluation.ruler.scoring import cleaned, string_match_all, string_match_part
from engram_jax.evaluation.ruler.words import LEAST_WORDS, NOISE, Texts

NEEDLE = re.compile(r"One special (?:number|uuid) for (\S+) is (\S+)\.(?=\s|$)")
LENGTHS = {"cwe": (3000, 9000)}
"""Its list needs more room than the others with a tokenizer as small as this one."""


def make_documents(rng, count: int = 30) -> list[str]:
    words = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 9))) for _ in range(300)]
    sentences = [" ".join(rng.choice(words, 9)).capitalize() + rng.choice([".", "!", "?"]) for _ in range(40 * count)]
    return ["  ".join(sentences[i::count]).replace("?", "?\n\n") for i in range(count)]


@pytest.fixture(scope="module")
def documents():
    return make_documents(np.random.default_rng(5))  # fixed, because lengths depend on the tokenizer made of them


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, 400)


@pytest.fixture(scope="module")
def texts(documents):
    return Texts.of(documents)


@pytest.fixture(scope="module")
def seed(request):
    return int(rng_of(request).integers(1 << 32))


@pytest.fixture(scope="module")
def items(tokenizer, texts, seed):
    """Four items of each family at a short and a long length."""
    return {
        (name, length): make_items(family, tokenizer, length, 4, seed, texts)
        for name, family in FAMILIES.items()
        for length in LENGTHS.get(name, (1200, 5000))
    }


def all_items(items, *names):
    return [(length, item) for (name, length), made in items.items() if name in names for item in made]


# --- lengths and draws ---


def test_no_item_is_longer_than_asked_and_few_are_much_shorter(items, tokenizer):
    shortest = 1.0
    for (name, length), made in items.items():
        for item in made:
            tokens = 1 + len(tokenizer.encode(item.input + item.answer_prefix)) + item.tokens_to_generate
            assert item.length == tokens <= length, name
            shortest = min(shortest, tokens / length)
    # One more line of uuids, the longest unit, has about 100 of the 1,200 tokens.
    assert shortest > 0.85


def test_the_seed_and_the_index_decide_an_item(items, tokenizer, texts, seed):
    for (name, length), made in items.items():
        if length < 5000:
            assert make_items(FAMILIES[name], tokenizer, length, 2, seed, texts) == made[:2]
            assert make_items(FAMILIES[name], tokenizer, length, 1, seed + 1, texts)[0].input != made[0].input
            assert len({item.input for item in made}) == 4


def test_budgets_are_the_published_ones_where_the_answer_fits(items, tokenizer):
    published = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    raised = set()
    for (name, _), made in items.items():
        budget = published.get(name, 128)
        for item in made:
            # A list of answers is written in full, of alternatives one.
            whole = [item.outputs] if FAMILIES[name].match == "part" else [[", ".join(item.outputs)]]
            needed = max(len(tokenizer.encode(" " + answer)) for answers in whole for answer in answers)
            assert item.tokens_to_generate == max(budget, needed)
            raised |= {name} if needed > budget else set()
    # This tokenizer knows no capitals: a variable's name takes five tokens and a comma.
    assert "vt" in raised and "qa_1" not in raised


def test_too_short_a_length_names_the_least(tokenizer, texts, seed):
    with pytest.raises(DoesNotFitError, match=r"niah_multiquery needs about [\d,]+ tokens .* not 150") as caught:
        make_items(FAMILIES["niah_multiquery"], tokenizer, 150, 1, seed, texts)
    enough = caught.value.least + 60  # other draws are a little longer
    assert make_items(FAMILIES["niah_multiquery"], tokenizer, enough, 3, seed, texts)[2].length <= enough


def test_thirteen_families_in_eight_groups():
    assert Counter(family.group for family in FAMILIES.values()) == {
        "niah_single": 3, "niah_multikey": 3, "niah_multivalue": 1, "niah_multiquery": 1, "vt": 1, "cwe": 1, "fwe": 1,
        "qa": 2,
    }  # fmt: skip
    assert len(GROUPS) == 8
    assert [f.name for f in chosen(["qa", "vt"])] == ["vt", "qa_1", "qa_2"] and len(chosen([])) == 13
    with pytest.raises(ConfigError, match=r"no family 'niah_singel'.*'niah_single'"):
        chosen(["niah_singel"])


# --- needles ---


@pytest.mark.parametrize(
    ("name", "needles", "queries", "values"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_2", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 1, 1),
        ("niah_multikey_2", None, 1, 1),
        ("niah_multikey_3", None, 1, 1),
        ("niah_multivalue", 4, 1, 4),
        ("niah_multiquery", 4, 4, 1),
    ],
)
def test_needles_hold_the_answers_and_nothing_else_does(items, name, needles, queries, values):
    for _, item in all_items(items, name):
        context, _, question = item.input.rpartition("\n")
        found = NEEDLE.findall(context)
        asked = re.search(r" for (.+) in the text above\?", question)[1].replace(" and ", ", ").split(", ")
        assert len(asked) == len(set(asked)) == queries
        expected = sorted(value for key, value in found if key in asked)
        assert sorted(item.outputs) == expected and len(set(expected)) == queries * values
        assert question.split(" for ")[1].split(" in the")[0] in item.answer_prefix
        if needles:
            assert len(found) == needles
        else:
            assert len(found) == context.count("\n") > 3  # nothing but needles
            assert len({key for key, _ in found}) > 0.9 * len(found)
        pattern = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
        is_uuid = name in ("niah_single_3", "niah_multikey_3")
        assert all(re.fullmatch(pattern if is_uuid else r"[1-9]\d{6}", value) for _, value in found)
        assert all(bool(re.fullmatch(pattern, key)) == (name == "niah_multikey_3") for key, _ in found)
        assert (NOISE in item.input) == (name == "niah_single_1")


def test_running_text_is_the_documents_and_needles_stand_between_sentences(items, texts):
    everything = " ".join(texts.sentences * 2)
    for length, item in all_items(items, "niah_single_2", "niah_multiquery"):
        context = item.input.split("\n", 1)[1].rpartition("\n")[0]
        parts = [part.strip() for part in re.split(r"One special number for \S+ is \d+\.", context)]
        if length == 5000:
            assert " ".join(part for part in parts if part) in everything
            assert len(context.split()) > 500
        # The last sentence may be cut short, and needles may follow it.
        for part in [part for part in parts if part][:-1]:
            assert part[-1] in ".!?"


def test_needles_lie_at_all_depths(tokenizer, texts, seed):
    made = make_items(FAMILIES["niah_single_2"], tokenizer, 1200, 40, seed, texts)
    depths = [item.input.index("One special") / len(item.input) for item in made]
    assert min(depths) < 0.25 and max(depths) > 0.6 and len({round(d, 2) for d in depths}) > 10


@pytest.mark.parametrize("place", [at_depths, at_random])
@pytest.mark.parametrize("size", [1, 3, 40, 200])
def test_placing_keeps_lines_and_needles_in_their_order(place, size, seed):
    lines, needles = [f"line {i}" for i in range(size)], [f"needle {i}" for i in range(5)]
    seen = set()
    for attempt in range(20):
        placed = place(Random(seed + attempt), lines, needles)
        assert [line for line in placed if line in lines] == lines
        assert [line for line in placed if line in needles] == needles and len(placed) == size + 5
        seen.add(placed.index("needle 0"))
    assert size < 40 or len(seen) > 2  # the first of five needles, 20 times


def test_distractors_are_for_other_keys(texts, seed, monkeypatch):
    drawn = iter(["asked", "1", "other", "2", "asked", "asked", "third", "3"])
    monkeypatch.setattr("engram_jax.evaluation.ruler.needles.draw", lambda rng, kind, texts: next(drawn))
    lines = Needles("needle", "words", "numbers").distractors(Random(seed), 2, ["asked", "1"], texts)
    assert lines == ["One special number for other is 2.", "One special number for third is 3."]


# --- variables, words, questions ---


def test_variables_follow_from_the_assignments(items):
    for _, item in all_items(items, "vt"):
        assert item.input.count("Question:") == 2  # an example goes before
        example, asked = item.input.split("\n\nFollow the chains")
        for text, outputs in ((example, example.rpartition(": ")[2].split()), (asked, item.outputs)):
            [value] = set(re.findall(r"hold the value (\d{5})", text))
            holds, order = {}, []
            for name, source in re.findall(r"^VAR ([A-Z]+) = (?:VAR )?([A-Z]+|\d+)$", text, re.M):
                holds[name] = holds.get(source, source)  # an assignment stands after the one it takes from
                order.append(name)
            assert [name for name in order if holds[name] == value] == list(outputs)
            assert len(outputs) == 5  # one chain of four hops
        assert value in item.answer_prefix and NOISE in asked


@pytest.mark.parametrize(("length", "times"), [(3000, (6, 1)), (9000, (30, 3))])
def test_common_words_are_common(items, length, times):
    for item in items["cwe", length]:
        shown, asked = (re.findall(r"(\d+)\. ([a-z]+)", part) for part in item.input.split("Question:")[:2])
        # The example's answer stands between the two questions.
        answer, asked = asked[:10], asked[10:]
        for entries, outputs, (common, other), size in (
            (shown, [word for _, word in answer], (3, 1) if length < 4096 else (10, 3), 20 if length < 4096 else 40),
            (asked, item.outputs, times, None),
        ):
            assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
            counts = Counter(word for _, word in entries)
            assert sorted(outputs) == sorted(word for word, n in counts.items() if n == common) and len(outputs) == 10
            assert set(counts.values()) == {common, other} and size in (None, len(counts))


def test_frequent_words_follow_zipf(items):
    for length, item in all_items(items, "fwe"):
        counts = Counter(re.search(r"most frequent ones\. (.*)\nQuestion", item.input)[1].split())
        ranked = counts.most_common()
        assert ranked[0][0] == "..." and tuple(word for word, _ in ranked[1:4]) == item.outputs
        assert ranked[3][1] > ranked[4][1]
        assert len(counts) <= length // 50 and all(
            re.fullmatch("[a-z]{6}", word) for word in list(counts - Counter(["..."] * ranked[0][1]))
        )
        # floor(n / k^2 / zeta(2)): rank 1 has 0.6079 of the words.
        n = (ranked[0][1] + 0.5) * np.pi**2 / 6
        for rank, (_, count) in enumerate(ranked[1:4], start=2):
            assert abs(count - n / rank**2 / (np.pi**2 / 6)) < 1.5


def test_invented_questions_are_answered_by_the_documents(items):
    for name, documents_needed in (("qa_1", 1), ("qa_2", 2)):
        for _, item in all_items(items, name):
            documents = re.split(r"\n\nDocument \d+:\n", item.input.split("\n\nAnswer the question")[0])[1:]
            question = item.input.rpartition("Question: ")[2]
            [answer] = item.outputs
            assert len([d for d in documents if answer in d]) >= 1
            subject = re.findall(r"[A-Z]\w+(?: [A-Z]\w+)?", question)[-1]
            [about] = [d for d in documents if d.startswith(subject + "\n")]
            if documents_needed == 2:
                town = re.search(r"in the town of (\w+)", about)[1]
                [about] = [d for d in documents if d.startswith(town + "\n")]
            wanted = {
                "river": r"river (\w+)",
                "founded": r"by (\w+ the \w+)",
                "year": r"in (\d{4})",
                "In which town": r"town of (\w+)",
            }
            [pattern] = [p for word, p in wanted.items() if word in question][:1]
            assert re.search(pattern, about)[1] == answer


# --- questions from files ---


@pytest.fixture
def squad_file(tmp_path):
    articles = [
        {
            "title": f"T{a}",
            "paragraphs": [
                {
                    "context": f"Article {a}, paragraph {p}: the answer of this one is value{a}x{p}.",
                    "qas": [
                        {"question": f"What has {a} {p}?", "is_impossible": False,
                         "answers": [{"text": f"value{a}x{p}"}, {"text": f"alt{a}x{p}"}]},
                        {"question": "Impossible?", "is_impossible": True, "answers": []},
                    ],
                }
                for p in range(4)
            ],
        }
        for a in range(5)
    ]  # fmt: skip
    path = tmp_path / "dev.json"
    path.write_text(json.dumps({"version": "v2.0", "data": articles}))
    return path


def test_squad_questions_come_with_their_article_first(squad_file, documents, tokenizer, seed):
    questions = read_squad(squad_file)
    assert len(questions.documents) == 20 and len(questions.questions) == 20
    assert questions.questions[5].answers == ("value1x1", "alt1x1") and len(questions.questions[5].related) == 3
    texts = Texts.of(documents, squad=questions)
    for length, count in ((400, None), (20_000, 20)):
        for item in make_items(FAMILIES["qa_1"], tokenizer, length, 3, seed, texts):
            used = re.findall(r"Article (\d+), paragraph (\d+)", item.input)
            article, paragraph = re.search(r"What has (\d+) (\d+)", item.input).groups()
            assert item.outputs == (f"value{article}x{paragraph}", f"alt{article}x{paragraph}")
            assert (article, paragraph) in used and len(set(used)) == len(used)
            own = sum(a == article for a, _ in used)
            assert own == min(len(used), 4)  # others only once the article is used up
            assert count in (None, len(used))


def test_hotpot_questions_bring_their_passages(tmp_path, documents, tokenizer, seed):
    entries = [
        {"question": f"Question {i}?", "answer": f"answer{i}",
         "context": [[f"Title {i}a", ["One. ", f"answer{i}."]], [f"Title {i}b", ["Two."]]]}
        for i in range(6)
    ]  # fmt: skip
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(entries))
    texts = Texts.of(documents, hotpot=read_hotpot(path))
    for item in make_items(FAMILIES["qa_2"], tokenizer, 300, 4, seed, texts):
        number = re.search(r"Question: Question (\d)", item.input)[1]
        assert item.outputs == (f"answer{number}",)
        assert f"Title {number}a\nOne. answer{number}." in item.input and f"Title {number}b\nTwo." in item.input


@pytest.mark.parametrize("read", [read_squad, read_hotpot])
@pytest.mark.parametrize("content", ["{", "[1]", '{"data": 3}', '{"data": []}', "[]"])
def test_other_files_are_refused(tmp_path, read, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"ruler\.(squad|hotpot)=.*x\.json'"):
        read(path)
    with pytest.raises(ConfigError, match="nowhere"):
        read(tmp_path / "nowhere.json")


# --- texts ---


def test_texts_without_words_of_their_own_get_made_up_ones():
    texts = Texts.of(["Über 12 Äpfel.  Ja, a b c!\n\nchapter one ends here", "下雨了。河很宽。"])
    assert texts.sentences == ("Über 12 Äpfel.", "Ja, a b c!", "chapter one ends here", "下雨了。", "河很宽。")
    assert len(set(texts.words)) == LEAST_WORDS and {"chapter", "ends", "here"} <= set(texts.words)
    assert all(re.fullmatch("[a-z]{4,10}", word) for word in texts.words)
    with pytest.raises(ConfigError, match=r"ruler\.essays"):
        Texts.of(["\n \n", ""])


# --- scores ---


def test_scores_on_cases_counted_by_hand():
    assert string_match_all("It is 123 and 456.", ["123", "456"]) == 100
    assert string_match_all("It is 123 and 45.", ["123", "456"]) == 50
    assert string_match_all("abc", ["ABC", "d", "b", "xyz"]) == 50  # whatever the case; b is a part of the text
    assert string_match_all("", ["a"]) == 0
    assert string_match_part("the Eiffel tower", ["Paris", "eiffel Tower"]) == 100
    assert string_match_part("the tower", ["Paris", "Eiffel"]) == 0
    assert cleaned(" a\tb\x00c\n ") == "a\nb\nc"
    assert string_match_all("two\twords", ["two words"]) == 0  # RULER makes a line break of a tab
