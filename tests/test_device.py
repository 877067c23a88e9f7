"""What a device tells of itself."""

from types import SimpleNamespace

import pynvml
import pytest
import torch

from steps.text2sql import device, sharding


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is made up, with or without NVLink; `linked` may be an error of NVML's."""

    def make(linked):
        def state(handle, link):
            if isinstance(linked, Exception):
                raise linked
            assert (handle, link) == ("handle of GPU-abc", 0)
            return int(linked)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="abc"))
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: f"handle of {uuid}")
        monkeypatch.setattr(pynvml, "nvmlDeviceGetNvLinkState", state)

    return make


@pytest.mark.parametrize(
    ("linked", "found"), [(True, True), (False, False), (pynvml.NVMLError_NotSupported(), False)]
)
def test_nvlink_is_what_nvml_says(gpu, linked, found):
    gpu(linked)
    assert device.has_nvlink() is found


def test_without_a_gpu_there_is_no_nvlink():
    assert device.has_nvlink() is False


@pytest.mark.parametrize(
    ("variables", "fast"),
    [
        ({}, True),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, False),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, True),
    ],
)
def test_weights_of_16_bits_are_gathered_over_nvlink_in_one_machine_alone(gpu, monkeypatch, variables, fast):
    gpu(True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert sharding.gathers_fast() is fast
    gpu(False)
    assert sharding.gathers_fast() is False


@pytest.mark.parametrize(("system", "most"), [("linux", 2 * 2**20), ("darwin", 2 * 2**30)])
def test_peak_memory_is_in_gib_in_whatever_the_system_counts(monkeypatch, system, most):
    monkeypatch.setattr(device.sys, "platform", system)
    monkeypatch.setattr(device.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=most))
    assert device.peak_memory_gib() == 2
