"""What a file should have held, in the words of its declaration."""

import pytest

from sparselearning.process.errors import FaultError
from sparselearning.process.schema import read


@pytest.mark.parametrize("value", [[None], {"0": None}])
def test_alternatives_are_named_in_their_own_order(value):
    for first, second, words in ((int, str, "a whole number or text"), (str, int, "text or a whole number")):
        inner = first | second
        kind = list[inner] if isinstance(value, list) else dict[str, inner]
        with pytest.raises(FaultError, match=rf"None, not {words}$"):
            read(kind, value, "file")
