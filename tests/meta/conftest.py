"""Loads the toy problems, which a subprocess also runs as a program."""

import importlib.util
import pathlib
import sys
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    path = pathlib.Path(__file__).with_name("toy.py")
    spec = importlib.util.spec_from_file_location("meta_toy", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["meta_toy"] = module
    spec.loader.exec_module(module)
    return module
