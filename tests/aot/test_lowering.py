"""What becomes of programs that the compiler gives up, and the tokenizer that stands in for a real one."""

from pathlib import Path

import jax
import pytest

from engram_jax.aot.lowering import TooLarge, allocated, compiled, memory_in, stand_in_tokenizer
from engram_jax.memory.compression import TokenMap

REFUSED = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (33.00G) exceeds "
    "available HBM (15.75G)."
)

REPORT = """Memory Space: default (color=0)
Total bytes: 10200825856 (9.50GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    2.00GiB( 33%);    2.00GiB;   2147500032;                2; bf16[3145728,256], f32[2097152,256]

Memory Space: vmem (color=1)
Total bytes: 262144 (256.0KiB)
"""


class Lowered:
    """A program whose compilation fails with these messages, one after the other, and then succeeds and is dumped."""

    def __init__(self, *messages):
        self.messages, self.options = list(messages), []

    def compile(self, compiler_options):
        folder = Path(compiler_options["xla_dump_to"])
        self.options.append(set(compiler_options) - {"xla_dump_to", "xla_dump_hlo_as_text"})
        if self.messages:
            raise jax.errors.JaxRuntimeError(self.messages.pop(0))
        (folder / "module_0001.jit_step.after_optimizations-memory-usage-report.txt").write_text(REPORT)
        return self

    def as_text(self):
        return "text"

    def memory_analysis(self):
        return "sizes"


def test_what_is_too_large_is_compiled_again_for_the_details():
    lowered = Lowered(REFUSED)
    done = compiled(lowered)  # type: ignore[arg-type]
    assert (done.text, done.allocated, done.is_accepted) == ("text", 10_200_825_856, False)
    assert lowered.options == [set(), {"xla_tpu_no_crash_on_oom"}]


def test_what_the_compiler_accepts_is_compiled_once():
    lowered = Lowered()
    assert compiled(lowered).is_accepted  # type: ignore[arg-type]
    assert lowered.options == [set()]


def test_a_dump_without_a_report_leaves_the_size_unknown(tmp_path):
    assert allocated(tmp_path) == 0
    (tmp_path / "a.memory-usage-report.txt").write_text(
        "Memory Space: vmem (color=1)\nTotal bytes: 262144 (256.0KiB)\n"
    )
    assert allocated(tmp_path) == 0


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
