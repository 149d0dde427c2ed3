"""A pytest plugin that runs before any test module is imported: threads and offline mode are read at import."""

import gc
import os

# Tests run two at a time, so each keeps to one thread.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")

# As the commands do: with all libraries in memory, looking for garbage is a good part of what short tests take.
gc.set_threshold(100_000)
