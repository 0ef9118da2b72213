"""Programs read back from their text: shapes, loops and how often their bodies run."""

import jax
import jax.numpy as jnp
import pytest

from engram_jax.aot import hlo
from engram_jax.aot.shapes import Shape
from engram_jax.aot.work import work


def compiled_text(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def rounds(module):
    loops = (
        hlo.trip_count(module, computation, i)
        for computation, _ in module.walk()
        for i in computation.instructions.values()
        if i.opcode == "while"
    )
    return sorted(n for n in loops if n is not None)


def test_scans_within_scans_multiply():
    def inner(x, w):
        return jnp.tanh(x @ w), None

    def outer(x, ws):
        return jax.lax.scan(inner, x, ws)

    ws, x = jnp.ones((3, 5, 32, 32)), jnp.ones((16, 32))
    module = hlo.parse(compiled_text(lambda x, ws: jax.lax.scan(outer, x, ws)[0], x, ws))
    assert rounds(module) == [3, 5]
    assert module.unknown_loops == []
    assert work(module).flops == 3 * 5 * 2 * 16 * 32 * 32


def test_the_gradient_of_a_scan_is_counted_with_its_forward_pass():
    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    module = hlo.parse(compiled_text(jax.grad(loss), jnp.ones((7, 24, 24)), jnp.ones((8, 24))))
    assert work(module).flops == 7 * 3 * 2 * 8 * 24 * 24 - 2 * 8 * 24 * 24 * (rounds(module) == [6, 7])


@pytest.mark.parametrize(("start", "stop", "step"), [(0, 12, 1), (3, 12, 1), (0, 13, 4), (2, 3, 1)])
def test_loops_from_any_start_by_any_step(start, stop, step):
    def count(x):
        return jax.lax.while_loop(lambda c: c[0] < stop, lambda c: (c[0] + step, jnp.sin(c[1])), (start, x))[1]

    module = hlo.parse(compiled_text(count, jnp.ones(4)))
    assert rounds(module) in ([len(range(start, stop, step))], [])  # XLA may unroll a single round


def test_a_loop_that_runs_until_its_data_say_so_is_unknown_and_counts_once():
    def halve(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1.0, lambda x: x @ jnp.full((4, 4), 0.1), x)

    module = hlo.parse(compiled_text(halve, jnp.ones((4, 4))))
    assert len(module.unknown_loops) == 1
    assert work(module).flops == 2 * 4**3


COUNTED = """HloModule m

%body (p: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%p), index=1
  %by = s32[]{:T(128)} get-tuple-element(%p), index=2
  %next = s32[]{:T(128)} add(%i, %by)
  %y = f32[8]{0:T(128)} negate(%x)
  ROOT %out = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%next, %y, %by)
}

%below (a: s32[], b: s32[]) -> pred[] {
  %a = s32[]{:T(128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  ROOT %less = pred[]{:T(512)} compare(%a, %b), direction=GT
}

%condition (q: (s32[], f32[8], s32[])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %end = s32[]{:T(128)} constant(3)
  ROOT %goes_on = pred[]{:T(512)} fusion(%j, %end), kind=kLoop, calls=%below
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0:T(128)} parameter(0), metadata={op_name="state.params[\\'w\\']"}
  %from = s32[]{:T(128)} constant(20)
  %kept = s32[]{:T(128)} copy(%from)
  %minus = s32[]{:T(128)} constant(-2)
  %start = (s32[]{:T(128)}, f32[8]{0:T(128)}, /*index=2*/s32[]{:T(128)}) tuple(%kept, %x.1, %minus)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}, s32[]{:T(128)}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8]{0:T(128)} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_downwards_with_its_step_carried_and_its_condition_in_a_fusion():
    """As a TPU's compiler leaves them, without `known_trip_count`: 20, 18, ... 4."""
    module = hlo.parse(COUNTED)
    assert rounds(module) == [9]
    assert module.times["body"] == 9


def test_names_and_scopes_are_read_as_they_were_written():
    (parameter,) = [i for i in hlo.parse(COUNTED).computations["main"].instructions.values() if i.opcode == "parameter"]
    assert parameter.scope == "state.params['w']"


@pytest.mark.parametrize(
    ("dtype", "dims", "layout", "padded", "space"),
    [
        ("f32", (20, 80), "1,0:T(8,128)", 24 * 128 * 4, 0),
        ("f32", (4, 256, 8), "1,2,0:T(8,128)S(1)", 4 * 8 * 256 * 4, 1),  # the second dim is the minor one
        ("bf16", (10, 128), "1,0:T(8,128)(2,1)", 16 * 128 * 2, 0),
        ("s32", (), ":T(128)", 512, 0),
        ("f32", (20,), "0:T(128)S(5)", 512, 5),
        ("f32", (20, 80), "1,0", 6400, 0),
        ("pred", (7,), "", 7, 0),
        ("f8e4m3fn", (16,), "", 16, 0),
    ],
)
def test_bytes_as_they_lie_in_memory(dtype, dims, layout, padded, space):
    shape = Shape(dtype, dims, layout)
    assert (shape.padded_bytes, shape.space) == (padded, space)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("nothing here")


BRANCHES = """HloModule m

%seldom (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4]{1,0} parameter(0)
  %twice = f32[4,4]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %thrice = f32[4,4]{1,0} dot(%twice, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%mostly (q: f32[4,4]) -> f32[4,4] {
  ROOT %q = f32[4,4]{1,0} parameter(0)
}, execution_thread="main"

ENTRY %main (k: s32[], x: f32[4,4]) -> f32[4,4] {
  %k = s32[] parameter(0)
  %x = f32[4,4]{1,0} parameter(1)
  %named = f32[4,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"profile":"of several lines"
}}, metadata={op_name="jit(f)/kernel"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"7"}}}
  ROOT %c = f32[4,4]{1,0} conditional(%k, %named, %named), branch_computations={%mostly, %seldom}
}
"""


def test_a_conditional_counts_its_shortest_branch_or_all_of_them():
    assert work(hlo.parse(BRANCHES)).flops == 7
    assert work(hlo.parse(BRANCHES, every_branch=True)).flops == 7 + 2 * 2 * 4**3


def test_metadata_of_several_lines_belongs_to_its_instruction():
    named = hlo.parse(BRANCHES).computations["main"].instructions["named"]
    assert named.scope == "jit(f)/kernel"
