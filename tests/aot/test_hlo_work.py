"""FLOPs and bytes counted in a program's text."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from engram_jax.aot import hlo
from engram_jax.aot.work import work

PROGRAMS = Path(__file__).parent / "programs"


def of(function, *arguments):
    return work(hlo.parse(jax.jit(function).lower(*arguments).compile().as_text()))


def test_products_by_einsum():
    a, b = jnp.ones((4, 32, 8)), jnp.ones((4, 8, 16))
    assert of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), a, b).flops == 2 * 4 * 32 * 8 * 16


def convolution(left, right, out, window, labels, more=""):
    return f"""HloModule m

ENTRY %main (a: f32[1], b: f32[1]) -> f32[1] {{
  %a = f32[{left}]{{0:T(8,128)}} parameter(0)
  %b = f32[{right}]{{0:T(8,128)}} parameter(1)
  ROOT %c = f32[{out}]{{0:T(8,128)}} convolution(%a, %b), window={{{window}}}, dim_labels={labels}{more}
}}
"""


@pytest.mark.parametrize(
    ("text", "flops"),
    [
        # an ordinary product: [4, 256, 512] x [512, 8]
        (convolution("4,256,512", "512,8,1", "4,256,8", "size=1", "0bf_io0->0bf"), 2 * 4 * 256 * 512 * 8),
        # [256, 64] x [64, 4 heads, 48]: the heads are a spatial dim, padded so that each meets the input once
        (
            convolution(
                "4,256,64,1", "1,64,4,48", "4,256,4,48", "size=1x4 pad=0_0x3_3 rhs_reversal=0x1", "0bf1_0i1o->0b1f"
            ),
            2 * 4 * 256 * 64 * 4 * 48,
        ),
        # a batched product, 4 x 4 of [256, 32] x [32, 256]: dilation leaves one meeting for each of the batch
        (
            convolution(
                "4,256,4,32", "4,256,4,32", "4,4,256,256", "size=4x4 stride=3x3 lhs_dilate=4x4", "0b1f_0o1i->01bf"
            ),
            2 * 16 * 256 * 32 * 256,
        ),
        # depthwise: one input feature to a group
        (
            convolution("2,10,6", "1,3,6", "2,8,6", "size=3", "b0f_i0o->b0f", ", feature_group_count=6"),
            2 * 2 * 6 * 8 * 3,
        ),
        # padding meets nothing: 'same' of width 3 over 8 places loses one at either end
        (convolution("2,8,6", "6,3,5", "2,8,5", "size=3 pad=1_1", "b0f_i0o->b0f"), 2 * 2 * 5 * 6 * (3 * 8 - 2)),
    ],
)
def test_products_as_a_tpu_writes_them(text, flops):
    assert work(hlo.parse(text)).flops == flops


KERNEL = (PROGRAMS / "tpu_kernels.hlo").read_text()


def test_kernels_count_what_they_declare_and_silent_ones_are_named():
    done = work(hlo.parse(KERNEL))
    assert done.flops == 1234 + 2 * 8 * 64 * 64 * (32 + 16)  # attention, causal: half the pairs
    assert done.silent_kernels == ["silent"]


@pytest.mark.parametrize(("batch", "kind", "widths"), [((5,), "fwd", 320), ((), "fwd", 320), ((), "dkv", 832)])
def test_causal_attention_counts_half_of_its_pairs_with_or_without_a_batch(batch, kind, widths):
    dims = [",".join(map(str, (*batch, 32, 4096, width))) for width in (192, 192, 128)]
    inputs = "\n".join(f"  %a{k} = bf16[{d}]{{0}} parameter({k})" for k, d in enumerate(dims))
    call = 'custom-call(%mask, %a0, %a1, %a2, %sum), custom_call_target="tpu_custom_call"'
    text = f"""HloModule m

ENTRY %main () -> bf16[{dims[2]}] {{
  %mask = s8[1,8,8]{{2,1,0}} parameter(3)
{inputs}
  %sum = f32[32,4096]{{1,0}} parameter(4)
  ROOT %splash_mha_{kind}.1 = bf16[{dims[2]}]{{0}} {call}
}}
"""
    assert work(hlo.parse(text)).flops == math.prod(batch) * 32 * 4096 * 4096 * widths


TRAFFIC = (PROGRAMS / "tpu_traffic.hlo").read_text()


def test_slices_and_updates_in_place_move_their_own_bytes_only():
    """A row read into VMEM, written back in place, and then the whole stack read and written."""
    row, stack = 8 * 128 * 4, 64 * 8 * 128 * 4
    done = work(hlo.parse(TRAFFIC))
    assert done.hbm_bytes == row + row + 2 * stack
    assert done.cycles == 111


PREFETCHED = """HloModule m

ENTRY %main (w: f32[64,1024]) -> f32[8,1024] {
  %w = f32[64,1024]{1,0:T(8,128)} parameter(0)
  %start = ((f32[64,1024]{1,0:T(8,128)}), f32[8,1024]{1,0:T(8,128)S(1)}, s32[]) slice-start(%w), slice={[0:8], [0:1024]}
  ROOT %done = f32[8,1024]{1,0:T(8,128)S(1)} slice-done(%start)
}
"""


def test_a_slice_that_is_fetched_ahead_moves_what_it_slices():
    assert work(hlo.parse(PREFETCHED)).hbm_bytes == 8 * 1024 * 4


SCATTERED = """HloModule m

%put (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %b = f32[] parameter(1)
}

%rows (table: f32[4096,256], ids: s32[16], new: f32[16,256]) -> f32[4096,256] {
  %table = f32[4096,256]{1,0} parameter(0)
  %ids = s32[16]{0} parameter(1)
  %new = f32[16,256]{1,0} parameter(2)
  ROOT %s = f32[4096,256]{1,0} scatter(%table, %ids, %new), update_window_dims={1}, to_apply=%put
}

%padded (table.1: f32[4096,256], ids.1: s32[16], new.1: f32[16,256]) -> f32[4096,256] {
  %table.1 = f32[4096,256]{1,0} parameter(0)
  %ids.1 = s32[16]{0} parameter(1)
  %new.1 = f32[16,256]{1,0} parameter(2)
  ROOT %within = f32[4096,256]{1,0} fusion(%table.1, %ids.1, %new.1), kind=kCustom, calls=%rows
}

ENTRY %main (t: f32[4096,256], i: s32[16], n: f32[16,256]) -> f32[4096,256] {
  %t = f32[4096,256]{1,0} parameter(0)
  %i = s32[16]{0} parameter(1)
  %n = f32[16,256]{1,0} parameter(2)
  ROOT %f = f32[4096,256]{1,0} fusion(%t, %i, %n), kind=kCustom, calls=%padded
}
"""


def test_a_scatter_in_place_moves_its_rows_not_the_table():
    rows, ids = 16 * 256 * 4, 16 * 4
    assert work(hlo.parse(SCATTERED)).hbm_bytes == ids + rows + 2 * rows
