"""All tests: one thread, no cache of the person's, shapes in signatures checked, warnings are errors."""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XDG_CACHE_HOME"] = os.environ.get("CONVINCE_TEST_CACHE") or tempfile.mkdtemp(prefix="convince-cache-")
os.environ.pop("CONVINCE_PARTS", None)

from jaxtyping import install_import_hook

install_import_hook("convince", "shapes.check")  # before anything of convince is imported

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("no clock", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])  # a busy machine is no failure
hypothesis.settings.load_profile("no clock")


@pytest.fixture
def real_data():
    """The folder of real sets, or a visible skip."""
    folder = os.environ.get("CONVINCE_DATA")
    if not folder:
        pytest.skip("CONVINCE_DATA is not set; see docs/data.md for what to put where")
    return folder
