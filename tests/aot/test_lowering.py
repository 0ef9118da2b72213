"""What becomes of programs that the compiler gives up, and the tokenizer that stands in for a real one."""

import jax
import pytest

from engram_jax.aot.lowering import TooLarge, compiled, memory_in, stand_in_tokenizer
from engram_jax.memory.compression import TokenMap

REFUSED = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (33.00G) exceeds "
    "available HBM (15.75G)."
)


class Lowered:
    """A program whose compilation fails with these messages, one after the other, and then succeeds."""

    def __init__(self, *messages):
        self.messages, self.options = list(messages), []

    def compile(self, compiler_options=None):
        self.options.append(compiler_options)
        if self.messages:
            raise jax.errors.JaxRuntimeError(self.messages.pop(0))
        return self

    def as_text(self):
        return "text"

    def memory_analysis(self):
        return "sizes"


def test_what_is_too_large_is_compiled_again_for_the_details():
    lowered = Lowered(REFUSED)
    assert compiled(lowered).text == "text"  # type: ignore[arg-type]
    assert lowered.options == [None, {"xla_tpu_no_crash_on_oom": "true"}]


@pytest.mark.parametrize(
    ("lowered", "detail"),
    [(Lowered(REFUSED), False), (Lowered(REFUSED, "INVALID_ARGUMENT: Invalid TPU program."), True)],
)
def test_without_details_the_compilers_words_say_how_large(lowered, detail):
    with pytest.raises(TooLarge, match=r"33\.00G") as raised:
        compiled(lowered, detail)
    assert raised.value.needed == 33 * 2**30


def test_other_errors_are_no_question_of_memory():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compiled(Lowered("INTERNAL: a bug"))  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "size"), [("needs 1.50M of 20K", 1572864), ("2T", 2**41), ("nothing", 0)])
def test_sizes_in_messages(text, size):
    assert memory_in(text) == size


@pytest.mark.parametrize(("vocabulary", "distinct"), [(300, 0), (300, 300), (300, 120), (1000, 77)])
def test_the_stand_in_compresses_to_what_the_config_expects(vocabulary, distinct):
    token_map = TokenMap.from_tokenizer(stand_in_tokenizer(vocabulary, distinct))
    assert (token_map.vocab_size, token_map.size) == (vocabulary, distinct or vocabulary)
