from engram_jax.inference.text import TextStream


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
