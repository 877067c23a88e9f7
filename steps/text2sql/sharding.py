"""A frozen base divided among processes, each holding a part of every layer."""

import os

import torch.distributed as dist
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from steps.text2sql import adapter, collectives, pulled_layers, ranks
from steps.text2sql.device import has_nvlink


def shard(model: PeftModel) -> None:
    """Divide the base, in place; a layer's weights are put together before the layer is computed.

    Near GPUs read each other's parts (`PulledLayers`); others gather them by collectives (FSDP version 2).
    The adapter is not divided: it is small, is trained in fp32, and its gradients, optimizer and files are
    those of a training in one process. While loading, each GPU holds the whole base. 4-bit weights stay
    bytes: kept in bf16 (`bnb_4bit_quant_storage`), those that read as NaN there would be copied as another
    NaN (https://github.com/pytorch/pytorch/issues/159333).
    """
    layers = adapter.decoder_layers(model)
    own = set(adapter.own(model))
    if gathers_fast() and pulled_layers.can_pull():
        pulled_layers.PulledLayers(layers, whole=own)
        return
    device = next(iter(own)).device.type
    settings = {
        "mesh": init_device_mesh(device, (dist.get_world_size(),)),
        "ignored_params": own,
        "reshard_after_forward": divides_again(),
    }
    for layer in layers:
        fully_shard(layer, **settings)
    fully_shard(model, **settings)


def divides_again() -> bool:
    """Whether a layer is divided again between its forward and its backward pass, as accelerate says it."""
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"


def gathers_fast() -> bool:
    """Whether the parts of a base come together fast enough for weights of 16 bits rather than of 4.

    Each pass over a pack gathers all of it. A base that is not divided again is held whole, which was asked
    for with 4 bits in mind.
    """
    is_near = ranks.count() == ranks.count_here() and divides_again()
    return bool(collectives.smallest(is_near and has_nvlink()))
