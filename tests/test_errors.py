"""The tree in the docstring is the tree."""

import re

import pytest

from anybit import errors
from anybit.errors import AnybitError

CLASSES = {name: value for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__}


def test_the_docstring_draws_every_error_and_no_other():
    assert set(re.findall(r"^\s+(?:\|--|`--)?\s*([A-Z]\w+)\s+[(\w]", errors.__doc__, re.M)) == set(CLASSES)


@pytest.mark.parametrize("error", CLASSES.values())
def test_every_error_is_an_anybit_error_and_a_value_error(error):
    assert issubclass(error, AnybitError) and issubclass(error, ValueError)
