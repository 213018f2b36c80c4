"""The Triton kernels of token trees compile for Hopper, which needs no GPU and which the interpreter does not show.

Launches are those of the benches; an integer that is 1 becomes a compile-time value.
"""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels.tree_attention import triton_attend, triton_compact  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter does not compile"),
]

MAX_SHARED_BYTES = 232_448
"""Shared memory a program of compute capability 9.0 may ask for (CUDA C++ programming guide, table of limits)."""
MAX_STACK_BYTES = 64
"""A few values computed once before the loop may be spilled; anything more would be of the loop."""


def compile_for_hopper(kernel: object, types: dict, constants: dict, directory: Path) -> int:
    """Compile a kernel and return its bytes of stack.

    Pointers, and the strides of what is not a scale, are told to be multiples of 16, as real caches have them.
    """
    names = kernel.arg_names
    aligned = [["tt.divisibility", 16]]
    attributes = {}
    values = {(names.index(name),): value for name, value in constants.items()}
    for name, kind in types.items():
        place = names.index(name)
        if isinstance(kind, tuple):
            values.update({(place, i): 1 for i, part in enumerate(kind) if part == "constexpr"})
            if "scale" not in name:
                attributes.update({(place, i): aligned for i, part in enumerate(kind) if part != "constexpr"})
        elif kind.startswith("*"):
            attributes[(place,)] = aligned
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= MAX_SHARED_BYTES
    binary = directory / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))


@pytest.mark.parametrize("is_int8", [True, False])
@pytest.mark.parametrize(("group", "max_rows"), [(8, 17), (2, 9)])
def test_attention(is_int8: bool, group: int, max_rows: int, tmp_path: Path) -> None:
    launch = triton_attend.choose_launch(group * max_rows, 128, is_int8=is_int8, is_float32=False)
    element = "*i8" if is_int8 else "*bf16"
    three = ("i32",) * 3
    types = {
        "query_ptr": "*bf16",
        "table_ptr": "*i32",
        "query_start_ptr": "*i64",
        "seq_lens_ptr": "*i32",
        "mask_ptr": "*i8",
        "key_ptr": element,
        "value_ptr": element,
        "row_lens_ptr": "*i32",
        **dict.fromkeys(("key_scale_ptr", "value_scale_ptr", "partial_ptr", "partial_lse_ptr"), "*fp32"),
        "query_strides": ("i32", "i32"),
        "key_strides": (*three, "constexpr"),
        **dict.fromkeys(("value_strides", "key_scale_strides", "value_scale_strides"), three),
        **dict.fromkeys(("table_stride", "mask_stride", "num_splits", "split_tokens"), "i32"),
        "score_scale": "fp32",
    }
    constants = {
        "PARTS": launch.num_parts,
        "GROUP": group,
        "BLOCK_SIZE": 16,
        "TILE": launch.tile,
        "ROWS": launch.num_rows,
        "HEAD_DIM": 128,
        "IS_INT8": is_int8,
    }
    assert compile_for_hopper(triton_attend._tree_split_kernel, types, constants, tmp_path) <= MAX_STACK_BYTES


@pytest.mark.parametrize(("element", "width"), [("*i32", 32), ("*bf16", 128), ("*fp32", 1)])
def test_compaction(element: str, width: int, tmp_path: Path) -> None:
    types = {
        "first_ptr": element,
        "second_ptr": element,
        **dict.fromkeys(("source_ptr", "target_ptr", "start_ptr"), "*i64"),
        **dict.fromkeys(("first_strides", "second_strides"), ("i32",) * 4),
        "num_heads": "i32",
    }
    constants = {"BLOCK_SIZE": 16, "HEADS": 4, "WIDTH": width}
    assert compile_for_hopper(triton_compact._compact_kernel, types, constants, tmp_path) == 0
