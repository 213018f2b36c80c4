"""The INT4 kernels compile for Hopper, which needs no GPU and which the interpreter does not show.

Launches are as on the model whose shapes the benches use; integers that are 1 become compile-time values.
"""

import re
import subprocess
from pathlib import Path

import pytest

from kernels.int4 import GROUP_SIZES

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels.int4 import triton as int4_triton  # noqa: E402
from kernels.int4 import triton_moe  # noqa: E402
from kernels.int4.triton_tile import Tile, choose_tile  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter does not compile"),
]

MAX_SHARED_BYTES = 232_448
"""Shared memory a program of compute capability 9.0 may ask for (CUDA C++ programming guide, table of limits)."""
MAX_STACK_BYTES = 64
"""A few values computed once before the loop may be spilled; anything more would be of the loop."""
POINTERS = {
    "x_ptr": "*bf16",
    "y_ptr": "*bf16",
    "output_ptr": "*bf16",
    "packed_ptr": "*u8",
    "scale_ptr": "*bf16",
    "weight_ptr": "*fp32",
    "weights_ptr": "*fp32",
    "parts_ptr": "*fp32",
    "bias_ptr": "*bf16",
    "ids_ptr": "*i32",
    "map_ptr": "*i32",
    "order_ptr": "*i32",
    "blocks_ptr": "*i32",
    "num_blocks_ptr": "*i32",
}


def compile_for_hopper(kernel: object, constants: dict, directory: Path, *, num_warps: int = 4, num_stages: int = 3):
    """Compile a kernel whose other integers are divisible by 16; return the result and its bytes of stack."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name not in constants}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= MAX_SHARED_BYTES
    binary = directory / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    return compiled, int(re.search(r"STACK:(\d+)", usage)[1])


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))


def tile_constants(tile: Tile, group_size: int, num_in: int) -> dict:
    return {
        "NUM_GROUPS": num_in // group_size,
        "GROUP": group_size,
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "STEP": tile.step,
        "SCALE_SUMS": tile.scale_sums,
    }


@pytest.mark.parametrize("tokens", [1, 64, 2048])
@pytest.mark.parametrize(("is_gated", "num_in"), [(True, 4096), (False, 1536)])
def test_experts(tokens: int, is_gated: bool, num_in: int, tmp_path: Path) -> None:
    tile = choose_tile(tokens)
    constants = {**tile_constants(tile, 128, num_in), "IS_GATED": is_gated, "top_k": 8}
    compiled, stack_bytes = compile_for_hopper(
        triton_moe._expert_kernel, constants, tmp_path, num_warps=tile.num_warps, num_stages=tile.num_stages
    )
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert stack_bytes <= MAX_STACK_BYTES


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(group_size: int, has_bias: bool, tmp_path: Path) -> None:
    tile = choose_tile(16)
    constants = {**tile_constants(tile, group_size, 4096), "HAS_BIAS": has_bias, "num_rows": 1, "steps_a_split": 1}
    if not has_bias:
        constants["bias_ptr"] = None
    compiled, stack_bytes = compile_for_hopper(
        int4_triton._linear_kernel, constants, tmp_path, num_warps=tile.num_warps, num_stages=tile.num_stages
    )
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert stack_bytes <= MAX_STACK_BYTES


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_quantise(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POINTERS, "weight_ptr", f"*{dtype}")
    monkeypatch.setitem(POINTERS, "scale_ptr", "*i16")
    compile_for_hopper(int4_triton._quantise_kernel, {"GROUP": 32, "GROUPS": 128}, tmp_path)


@pytest.mark.parametrize("has_map", [False, True])
@pytest.mark.parametrize("number", [1, 4])
def test_routing_and_sums(has_map: bool, number: int, tmp_path: Path) -> None:
    nothing = {} if has_map else {"map_ptr": None}
    few = {"top_k": number, "num_experts": number}
    compile_for_hopper(triton_moe._add_choices_kernel, {"HAS_MAP": has_map, "TILE": 1024, **few, **nothing}, tmp_path)
    sizes = {"BLOCK_TOKENS": 16, "EXPERTS": number, "CHUNK": 64, "BLOCKS": 64, "num_assignments": number}
    route = {**sizes, "HAS_MAP": has_map, "num_experts": number, "max_blocks": number, **nothing}
    compile_for_hopper(triton_moe._route_kernel, route, tmp_path, num_warps=8)
    sums = {"bias_ptr": None, "SPLITS": 2, "HAS_BIAS": False, "TILE": 1024, "num_out": number}
    compile_for_hopper(int4_triton._add_splits_kernel, sums, tmp_path)
