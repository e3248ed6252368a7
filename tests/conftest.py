"""Nothing here downloads, and nothing prints progress bars."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import pytest
import torch

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
