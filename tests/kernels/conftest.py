"""Scripts are run by tests, each in a process of its own: they are not collected."""

import os
import subprocess

import host_launcher
import pytest

collect_ignore = ["scripts"]


@pytest.fixture(scope="session")
def host_native(tmp_path_factory):
    """The native extension built for a host in place of CUDA: the module, its machine and its file."""
    pytest.importorskip("pybind11", reason="pybind11 is not installed: nothing to bind with")
    if host_launcher.COMPILER is None:
        pytest.skip("no C++ compiler")
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers: one builds it
    try:
        return host_launcher.build(base / "host_native")
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr)
