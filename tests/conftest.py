"""Skip GPU tests without a GPU, seed every test, and a limit on file sizes."""

import logging
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
def _seed():
    torch.manual_seed(20180313)


@pytest.fixture(autouse=True)
def _log_level():
    """indrnn-train called in this process raises it."""
    logger = logging.getLogger("indrnn")
    yield
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def limited_file_size():
    """``with limited_file_size(bytes):`` a write that makes a file larger is cut short, as on a full disk."""
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
