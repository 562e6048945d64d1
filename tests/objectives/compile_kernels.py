"""Compiles the Triton kernels for an NVIDIA H100, which needs no GPU; run as a program, without Triton's interpreter."""

import itertools

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from concentration.objectives import fused_block_triton as kernels
from concentration.objectives import grouped_kernels

TARGET = GPUTarget("cuda", 90, 32)


def main() -> None:
    number, index = "*fp32", "*i64"
    for logits, slope, (gamma, offset, weight) in zip(
        itertools.cycle(["*fp32", "*bf16", "*fp16"]),
        itertools.cycle(["*fp32", "*bf16", "*bf16"]),
        [(0, 0, False), (1, 2, False), (2, 1, True)],
        strict=False,
    ):
        form = {"GAMMA": gamma, "OFFSET": offset, "HAS_CLASS_WEIGHT": weight}
        dense = {**form, "HAS_BACKGROUND": weight}
        compile_kernel(kernels._norms, [logits, number, "i32", "i32"], {"BLOCK": 2048})
        rows = [logits, *[number] * 5, index, *[number] * 5, "i32", "i32", "i32"]
        compile_kernel(kernels._rows, rows, {**dense, "BLOCK": 2048, "BLOCK_K": 128})
        slopes = [logits, *[number] * 8, slope, *[number] * 3, "i32", "i32", "i32"]
        compile_kernel(kernels._slopes, slopes, {**dense, "ROWS": 16, "CLASSES": 128, "TILES": 4})
        listed = [*[number] * 3, index, *[number] * 4, slope, *[number] * 3, "i32", "i32"]
        compile_kernel(kernels._listed, listed, {**form, "BLOCK_K": 128})
        compile_kernel(kernels._scale, [slope, number, "i32"], {"BLOCK": 4096})
        compile_grouped(form, dense)


def compile_grouped(form: dict, dense: dict) -> None:
    number, index, table, logits = "*fp32", "*i64", "*i32", "*bf16"
    rows = [logits, *[table] * 3, *[number] * 5, index, *[number] * 6, *["i32"] * 4]
    constants = {**dense, "EPSILON": 1e-6, "BLOCK": 2048, "BLOCK_K": 128}
    compile_kernel(grouped_kernels._rows, rows, constants)
    slopes = [logits, *[table] * 5, *[number] * 12, *["i32"] * 3]
    compile_kernel(grouped_kernels._slopes, slopes, {**dense, "ROWS": 16, "CLASSES": 128, "TILES": 4})
    listed = [logits, *[table] * 3, *[number] * 2, index, *[number] * 8, *["i32"] * 5]
    compile_kernel(grouped_kernels._listed, listed, {**form, "BLOCK_K": 128})


def compile_kernel(kernel: JITFunction, types: list[str], constants: dict[str, object]) -> None:
    of_arguments = iter(types)
    signature = {name: "constexpr" if name in constants else next(of_arguments) for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    binary = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=places), target=TARGET)
    print(kernel.__name__, len(binary.asm["cubin"]), "bytes")


if __name__ == "__main__":
    main()
