"""Accelerators by their data sheets: memory, bandwidth, arithmetic, links.

Owns published figures and nothing else. All are dense (no structured sparsity), of one GPU, links one way: half of
the total that the sheets state.

Sources: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM, HGX B200 and GB200 NVL72; of the H20, which
has no public sheet, the figures that vendors of its servers give; AMD's data sheets of the Instinct MI300X and MI355X.
"""

from __future__ import annotations

from dataclasses import dataclass

NODE_GPUS = 8  # joined by NVLink; a larger expert-parallel group talks over the network
NETWORK_BYTES_PER_S = 50e9  # a GPU's 400 Gb/s card; DeepEP reaches 43-58 GB/s of it (docs/legacy.md in its repository)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One GPU.

    Attributes:
        name: As in cluster file names.
        memory_bytes: Of its memory.
        memory_bytes_per_s: Bandwidth of that.
        flops: FLOP/s of matrix products in bfloat16.
        link_bytes_per_s: To the others of its node.
        fp8_flops, fp4_flops: The same in FP8 and FP4; None where the hardware has no such units.
        node_gpus: GPUs that the link joins.
    """

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops: float
    link_bytes_per_s: float
    fp8_flops: float | None = None
    fp4_flops: float | None = None
    node_gpus: int = NODE_GPUS

    def rate(self, arithmetic: str) -> float:
        """FLOP/s in "bf16", "fp8" or "fp4"; where the hardware lacks one, the next wider is used."""
        fp8 = self.fp8_flops or self.flops
        return {"bf16": self.flops, "fp8": fp8, "fp4": self.fp4_flops or fp8}[arithmetic]


ACCELERATORS = {
    gpu.name: gpu
    for gpu in (
        Accelerator(name="a100", memory_bytes=80e9, memory_bytes_per_s=2.039e12, flops=312e12, link_bytes_per_s=300e9),
        Accelerator(
            name="h20",
            memory_bytes=96e9,
            memory_bytes_per_s=4.0e12,
            flops=148e12,
            link_bytes_per_s=450e9,
            fp8_flops=296e12,
        ),
        Accelerator(
            name="h100",
            memory_bytes=80e9,
            memory_bytes_per_s=3.35e12,
            flops=989e12,
            link_bytes_per_s=450e9,
            fp8_flops=1979e12,
        ),
        Accelerator(
            name="h200",
            memory_bytes=141e9,
            memory_bytes_per_s=4.8e12,
            flops=989e12,
            link_bytes_per_s=450e9,
            fp8_flops=1979e12,
        ),
        Accelerator(
            name="b200",
            memory_bytes=180e9,
            memory_bytes_per_s=7.7e12,
            flops=2250e12,
            link_bytes_per_s=900e9,
            fp8_flops=4500e12,
            fp4_flops=9000e12,
        ),
        Accelerator(
            name="gb200",
            memory_bytes=186e9,
            memory_bytes_per_s=8e12,
            flops=2500e12,
            link_bytes_per_s=900e9,
            fp8_flops=5000e12,
            fp4_flops=10_000e12,
            node_gpus=72,
        ),
        Accelerator(
            name="mi300x",
            memory_bytes=192e9,
            memory_bytes_per_s=5.3e12,
            flops=1307e12,
            link_bytes_per_s=448e9,
            fp8_flops=2615e12,
        ),
        Accelerator(
            name="mi355x",
            memory_bytes=288e9,
            memory_bytes_per_s=8e12,
            flops=2500e12,
            link_bytes_per_s=537e9,
            fp8_flops=5000e12,
            fp4_flops=10_000e12,
        ),
    )
}
