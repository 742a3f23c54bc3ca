"""Skips what this machine cannot run, and gives every test the same random numbers."""

from contextlib import contextmanager

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(20180313)


@pytest.fixture
def limited_file_size():
    """``with limited_file_size(bytes):`` the write that makes a file larger is cut short, as on a full disk.

    A block and not the whole test, because pytest writes its own output, perhaps into a file, before fixtures end.
    """
    resource = pytest.importorskip("resource")

    @contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
