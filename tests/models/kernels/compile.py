"""Compile all kernels for an H100 as they are launched for InternViT-6B in bf16, and name them."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlfoundry.models.kernels import norms, pairs, residual, unshuffle

H100 = GPUTarget("cuda", 90, 32)
ROW = {"WIDTH": 3200, "BLOCK": 4096, "INNER": tl.float32}
HEADS = {**ROW, "HEAD": 128}
SQUARE = {"MERGE": 2, "PIECE": 3200, "INNER": tl.float32}
TILE = {"WIDTH": 768, "INNER": tl.float32, **pairs.BLOCKS}
BARE = {"bias": None, "factor": None, "norm_weight": None, "out": None, "normed": None}
KERNELS = {  # name: kernel, what is fixed when it is compiled, warps
    "residual": (residual.forward_kernel, ROW, 8),
    "residual_backward": (residual.backward_kernel, ROW, 8),
    "bare_residual": (residual.forward_kernel, ROW | BARE | {"out": "*bf16"}, 8),
    "bare_residual_backward": (residual.backward_kernel, ROW | BARE, 8),
    "squares": (norms.squares_kernel, HEADS, 8),
    "norm": (norms.forward_kernel, HEADS | {"squares": None}, 8),
    "norm_over_ranks": (norms.forward_kernel, HEADS, 8),
    "norm_of_rows": (norms.forward_kernel, HEADS | {"squares": None, "HEAD": 3200, "batch": 1}, 8),
    "dots": (norms.dots_kernel, HEADS, 8),
    "norm_backward": (norms.backward_kernel, HEADS | {"dots": None}, 8),
    "norm_over_ranks_backward": (norms.backward_kernel, HEADS, 8),
    "shuffle": (unshuffle.forward_kernel, SQUARE | {"BLOCK": 16384}, 32),
    "shuffle_backward": (unshuffle.backward_kernel, SQUARE | {"BLOCK": 16384}, 32),
    "shuffle_sums": (unshuffle.sums_kernel, SQUARE | {"BLOCK": unshuffle.COLUMN_BLOCK}, 4),
    "largest": (pairs.largest_kernel, TILE, 4),
    "softmax": (pairs.softmax_kernel, TILE, 4),
    "sigmoid": (pairs.sigmoid_kernel, TILE, 4),
}
# Of arguments in fp32; other tensors are in bf16, and what is left are numbers.
FP32 = {
    "factor", "reciprocal", "grad_bias", "grad_scale", "grad_weight", "squares", "dots",
    "weight_sums", "statistics", "sums",
}  # fmt: skip
OF_PAIRS = {"rows", "columns", "top", "total", "row_max", "row_grad", "column_max"}
OF_PAIRS |= {"column_grad", "bias", "out", "sums"}
NUMBERS = {
    "rows", "batch", "each", "true_width", "squares", "inner", "row_count", "column_count",
}  # fmt: skip


def compile_one(kernel, fixed: dict, warps: int) -> None:
    is_pairs = "CHANNELS" in fixed
    types, constants, aligned = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in fixed and not isinstance(fixed[name], str):
            types[name], constants[name] = "constexpr", fixed[name]
            continue
        types[name] = _type_of(name, is_pairs, is_shuffle="PIECE" in fixed)
        if types[name].startswith("*") or name.endswith("_step"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constants, aligned)
    compiled = triton.compile(source, target=H100, options={"num_warps": warps})
    assert compiled.asm["cubin"]


def _type_of(name: str, is_pairs: bool, is_shuffle: bool) -> str:
    if name == "eps":
        return "fp32"
    if name == "best":
        return "*i64"
    if is_pairs:
        return "*fp32" if name in OF_PAIRS else "i32"
    if name.endswith("_step") or (name in NUMBERS and not (name == "squares" and not is_shuffle)):
        return "i32"
    return "*fp32" if name in FP32 else "*bf16"


if __name__ == "__main__":
    for name, kernel in KERNELS.items():
        compile_one(*kernel)
        print(name)
