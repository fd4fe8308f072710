"""Peak speed of accelerators, what MFU is a share of."""

from __future__ import annotations

PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.4,
    "GH200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,  # "NVIDIA H100 80GB HBM3", the SXM module
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A10": 125.0,
    "A30": 165.0,
    "A40": 149.7,
    "RTX 6000 Ada": 364.2,
    "L40S": 362.1,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI300X": 1307.4,
}
"""Dense bfloat16 with float32 accumulation, 1e12 FLOP/s, by a part of the device's name.

Sources: NVIDIA's data sheets of each product and the white papers of the Ampere, Ada and Blackwell RTX architectures;
AMD's data sheet of the MI300X. Figures "with sparsity" are halved. Boost clocks: no card holds them under load.
"""


def peak_tflops(device_name: str) -> float | None:
    """Returns the peak of a device in 1e12 FLOP/s, dense bfloat16; None if it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it, for example `NVIDIA H100 80GB HBM3`.
    """
    words = device_name.replace("-", " ").split()
    # The longest name wins: "H100 PCIe" before "H100". Whole words: an "A100" is no "A10".
    found = [name for name in PEAK_TFLOPS if contains(words, name.split())]
    return PEAK_TFLOPS[max(found, key=len)] if found else None


def contains(words: list[str], part: list[str]) -> bool:
    """Returns whether `part` stands in `words`, in order and side by side."""
    return any(words[at : at + len(part)] == part for at in range(len(words) - len(part) + 1))
