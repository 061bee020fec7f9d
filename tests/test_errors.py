"""The docstring's tree of errors matches the classes."""

import re

import pytest

from anybit import errors
from anybit.errors import AnybitError

CLASSES = {name: value for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__}


def test_docstring_tree_has_exactly_the_error_classes():
    assert set(re.findall(r"^\s+(?:\|--|`--)?\s*([A-Z]\w+)\s+[(\w]", errors.__doc__, re.M)) == set(CLASSES)


@pytest.mark.parametrize("error", CLASSES.values())
def test_every_error_is_an_anybit_error_and_a_value_error(error):
    assert issubclass(error, AnybitError) and issubclass(error, ValueError)
