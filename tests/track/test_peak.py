"""The peak of a device is found by its name."""

import pytest

from eagle_train.track.peak import peak_tflops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_devices_are_known_by_whole_words_of_their_names(name, peak):
    assert peak_tflops(name) == peak


@pytest.mark.parametrize("name", ["CPU", "NVIDIA A1000", "NVIDIA T4", ""])
def test_an_unknown_device_has_no_peak(name):
    assert peak_tflops(name) is None
