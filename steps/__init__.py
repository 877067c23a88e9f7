"""The pipeline: one module an entry point of MLproject."""

import logging

# On CPUs with native bf16 it asks, while it is imported, for kernels that would be fetched from a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
