"""Loads the toy problems, which a subprocess also runs as a program, and what is computed by hand of them."""

import importlib.util
import pathlib
import sys
from types import ModuleType

import pytest


def load(name: str) -> ModuleType:
    path = pathlib.Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"meta_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"meta_{name}"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    return load("toy")


@pytest.fixture(scope="session")
def by_hand(toy: ModuleType) -> ModuleType:
    return load("by_hand")
