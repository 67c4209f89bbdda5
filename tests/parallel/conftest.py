"""Processes that a file's tests share: starting two takes a second."""

import pytest
from rank_pool import rank_pool


@pytest.fixture(scope="module")
def two():
    with rank_pool(2) as pool:
        yield pool


@pytest.fixture(scope="module", params=[4, 8])
def many(request):
    with rank_pool(request.param) as pool:
        yield pool
