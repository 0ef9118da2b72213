from types import SimpleNamespace

from engram_jax.inference.sampling import Sampling
from engram_jax.inference.text import TextStream, continued
from engram_jax.inference.text import pieces as pieces_of


def pieces(tokenizer, ids, stop=()):
    stream, shown = TextStream(tokenizer, [tokenizer.bos_id], stop), []
    for token in ids:
        if stream.push(token):
            break
        shown.append(stream.take())
    return [*shown, stream.take(last=True)], stream.stopped


def test_characters_of_several_tokens_come_whole_and_special_tokens_not_at_all(tokenizer):
    ids = [*tokenizer.encode(" 漢字 😀é"), tokenizer.pad_id, *tokenizer.encode("\n  end")]
    shown, stopped = pieces(tokenizer, ids)
    assert "".join(shown) == " 漢字 😀é\n  end" and not stopped
    assert not any("\ufffd" in piece for piece in shown)


def test_a_text_ends_before_a_stop_string_wherever_tokens_end(tokenizer):
    text = "one two\n\nthree stop"
    for stop in (("\n\nth",), ("wo\n", "two"), ("one",), ("p", "stop")):
        shown, stopped = pieces(tokenizer, tokenizer.encode(text), stop)
        assert stopped and "".join(shown) == text[: min(text.find(s) for s in stop)]
    # Never shown and then taken back: what may be a beginning is held until it is none.
    shown, stopped = pieces(tokenizer, tokenizer.encode(text), ("stopped", "\n\nthe"))
    assert not stopped and "".join(shown) == text


def test_an_empty_stop_string_is_none(tokenizer):
    assert pieces(tokenizer, tokenizer.encode("abc"), ("",))[1] is False


def drawing(*texts_as_ids, max_len=1000):
    """An engine that draws these ids, in turns, up to its limits."""

    def stream(prompts, sampling, ends):
        live = {index: list(ids) for index, ids in enumerate(texts_as_ids)}
        made = dict.fromkeys(live, 0)
        while live:
            for index in list(live):
                if not live[index] or ends(index, token := live[index].pop(0)):
                    del live[index]
                    continue
                made[index] += 1
                yield index, token
                if made[index] == sampling.max_tokens or len(prompts[index]) + made[index] == max_len:
                    live.pop(index, None)

    return SimpleNamespace(stream=stream, max_len=max_len)


def test_tokens_are_counted_apart_from_the_text_that_is_held_back(tokenizer):
    text = "one two three"
    ids = tokenizer.encode(text)
    prompts, stop = [[tokenizer.bos_id]] * 3, ("three stop",)
    by_eos, by_stop = [*ids, tokenizer.eos_id], [*tokenizer.encode("one two three stop"), *ids]
    for limits in ({"max_tokens": len(ids)}, {"max_tokens": 100, "max_len": 1 + len(ids)}):
        sampling = Sampling(limits.pop("max_tokens"), temperature=0)
        engine = drawing(ids, by_eos, tokenizer.encode("stop"), **limits)
        found = list(pieces_of(engine, tokenizer, prompts, sampling, stop))
        for index in (0, 1):
            ours = [piece for piece in found if piece.prompt == index]
            assert "".join(piece.text for piece in ours) == text
            assert sum(piece.tokens for piece in ours) == len(ids)
            assert [piece.ended for piece in ours] == [False] * (len(ours) - 1) + [True]
    found = list(pieces_of(drawing(by_stop), tokenizer, prompts[:1], Sampling(100, temperature=0), stop))
    assert "".join(piece.text for piece in found) == "one two " and found[-1] == (0, found[-1].text, 0, True)
    assert sum(piece.tokens for piece in found) < len(by_stop) - len(ids)


def test_continued_yields_the_text_of_the_pieces(tokenizer):
    engine = drawing([*tokenizer.encode("one two three"), tokenizer.eos_id])
    shown = list(continued(engine, tokenizer, [[tokenizer.bos_id]], Sampling(100, temperature=0), ("three stop",)))
    assert {index for index, _ in shown} == {0} and "".join(text for _, text in shown) == "one two three"
