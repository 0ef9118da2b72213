"""What becomes of programs that the compiler gives up, and the tokenizer that stands in for a real one."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from engram_jax.aot.lowering import TooLarge, allocated, compiled, memory_in, stand_in_tokenizer
from engram_jax.memory.compression import TokenMap

REFUSED = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (33.00G) exceeds "
    "available HBM (15.75G)."
)

ASSIGNMENT = """BufferAssignment:
allocation 0: size 4, color 2, preallocated-temp:
allocation 1: size 256020480, color 5, parameter 64, shape |f32[1000072,64]| at ShapeIndex {}:
 value: <7265 param.121 @5> (size=256020480,offset=0): f32[1000072,64]{1,0:T(1)L(1024)S(5)}
allocation 3: size 196608, parameter 68, shape |bf16[2,1,256,1,192]| at ShapeIndex {}, maybe-live-out:
 value: <5 param.3 @0> (size=196608,offset=0): bf16[2,1,256,1,192]{4,3,2,1,0:T(8,128)(2,1)}
allocation 239: size 512036864, thread-local:
 value: <226 param.45 @0> (size=512036864,offset=0): f32[1000072,64]{1,0}
allocation 546: size 2523456, preallocated-temp:
 value: <9 fusion.1 @0> (size=4096,offset=0): f32[1024]{0:T(1024)}
allocation 547: size 234496, color 1, preallocated-temp:
"""
ALLOCATED = 196_608 + 2_523_456
"""An argument in HBM and the temporaries; not what lies in vmem or on the host, or is the host's own."""


class Lowered:
    """A program whose compilation fails with these messages, one after the other, and then succeeds and is dumped."""

    def __init__(self, *messages):
        self.messages, self.options = list(messages), []

    def compile(self, compiler_options):
        folder = Path(compiler_options["xla_dump_to"])
        self.options.append(set(compiler_options) - {"xla_dump_to", "xla_dump_hlo_as_text"})
        if self.messages:
            raise jax.errors.JaxRuntimeError(self.messages.pop(0))
        (folder / "module_0001.jit_step.after_optimizations-buffer-assignment.txt").write_text(ASSIGNMENT)
        return self

    def as_text(self):
        return "text"

    def memory_analysis(self):
        return "sizes"


def test_what_is_too_large_is_compiled_again_for_the_details():
    lowered = Lowered(REFUSED)
    done = compiled(lowered)  # type: ignore[arg-type]
    assert (done.text, done.allocated, done.is_accepted) == ("text", ALLOCATED, False)
    assert lowered.options == [set(), {"xla_tpu_no_crash_on_oom"}]


def test_what_the_compiler_accepts_is_compiled_once():
    lowered = Lowered()
    assert compiled(lowered).is_accepted  # type: ignore[arg-type]
    assert lowered.options == [set()]


WHOLE = "HloModule b\n\nENTRY %main {\n  ROOT %a = s32[] add(), config={}\n}"


class Slow:
    """A program whose buffers are assigned soon and whose code is never done."""

    def __init__(self, error=None):
        self.error, self.done = error, threading.Event()

    def compiler_ir(self):
        text = {"sym_name": SimpleNamespace(value="jit_step")}
        return SimpleNamespace(operation=SimpleNamespace(attributes=text))

    def compile(self, compiler_options):
        folder = Path(compiler_options["xla_dump_to"])
        (folder / "module_0000.jit_iota.after_optimizations_after_buffer_assignment.txt").write_text(
            "HloModule a {\n}\n"
        )
        if self.error:
            raise jax.errors.JaxRuntimeError(self.error)
        (folder / "module_0001.jit_step.after_optimizations-buffer-assignment.txt").write_text(ASSIGNMENT)
        file = folder / "module_0001.jit_step.cl_1.after_optimizations_after_buffer_assignment.txt"
        file.write_text("HloModule b\n\nENTRY %main {\n  ROOT %a = s32[] add(), config={}")
        time.sleep(0.8)
        file.write_text(WHOLE + "\n\n")
        self.done.wait(60)


def test_the_quick_answer_does_not_wait_for_code():
    slow = Slow()
    done = compiled(slow, quick=True)  # type: ignore[arg-type]
    assert not slow.done.is_set() and done.is_accepted
    assert (done.text, done.sizes, done.allocated) == (WHOLE, None, ALLOCATED)
    slow.done.set()
    done = Slow()
    done.done.set()
    assert compiled(done, quick=True).text == WHOLE  # type: ignore[arg-type]
    with pytest.raises(TooLarge, match=r"33\.00G"):
        compiled(Slow(REFUSED), detail=False, quick=True)  # type: ignore[arg-type]


def test_the_largest_program_of_a_dump_counts_and_without_one_the_size_is_unknown(tmp_path):
    assert allocated(tmp_path) == 0
    for name, text in (("a", "allocation 0: size 8, preallocated-temp:\n"), ("b", ASSIGNMENT), ("c", "")):
        (tmp_path / f"module_{name}-buffer-assignment.txt").write_text(text)
    assert allocated(tmp_path) == ALLOCATED


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
