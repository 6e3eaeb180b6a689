"""What the tests of images share."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def images() -> ModuleType:
    """tests/helpers/images.py: files of every format, trees of them, and ways to break them."""
    return importlib.import_module("images")


@pytest.fixture(scope="session")
def photos() -> ModuleType:
    """benchmarks/imagenetlike.py: JPEG files like ImageNet's."""
    sys.path.append(str(BENCHMARKS))
    try:
        return importlib.import_module("imagenetlike")
    finally:
        sys.path.remove(str(BENCHMARKS))
