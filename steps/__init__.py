"""The pipeline: one module an entry point of MLproject."""

import logging
import os
import signal
import sys

# Until a step listens to signals, and after it, Ctrl-C ends its process without a traceback of its imports.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# On CPUs with native bf16 it asks, while it is imported, for kernels that would be fetched from a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Threads of OpenMP wait for each other in a loop, 300,000 turns by GNU's default. Where they do not have the
# cores to themselves, that loop takes the time that the others need: on two cores, answers took 1.2 times as
# long as with this limit beside one busy process, and 2 to 3 times beside a second pipeline. With shorter
# loops training on idle cores gets slower. It counts where torch is loaded after this.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
