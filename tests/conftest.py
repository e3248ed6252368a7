"""Nothing here downloads, nothing prints progress bars, and nothing takes more than one core."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# workers of pytest-xdist share the cores; a process of its own takes this from its environment
os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers
import pytest
import torch

from tests.support.selection import in_part, mark_all_but_few

collect_ignore = ["scripts"]  # run by tests in processes of their own
torch.set_num_threads(1)
diffusers.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", metavar="K/N", type=_part, help="the K-th (from 0) of N parts of the tests, by their names"
    )
    parser.addoption("--all-cases", action="store_true", help="those too that the marker few leaves out")


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(text)
    return int(part), int(parts)


@pytest.hookimpl(tryfirst=True)  # before what is slow is left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.all_cases:
        mark_all_but_few(items)
    if config.option.part is None:
        return
    part, parts = config.option.part
    own = {item for item in items if in_part(item, part, parts)}
    config.hook.pytest_deselected(items=[item for item in items if item not in own])
    items[:] = [item for item in items if item in own]


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
