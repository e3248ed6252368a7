"""Nothing here downloads, nothing prints progress bars, and nothing takes more than one core."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# workers of pytest-xdist share the cores; a process of its own takes this from its environment
os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers
import pytest
import torch

collect_ignore = ["scripts"]  # run by tests in processes of their own
torch.set_num_threads(1)
diffusers.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shapes_pipe():
    """The bundled pipeline; tests leave it uncached."""
    import hicache.demo

    pipe = hicache.demo.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe
