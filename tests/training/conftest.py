"""Fixtures of the tests of runs."""

import numpy as np
import pytest

from sparselearning.training import flags


@pytest.fixture
def tiny_defaults(tmp_path, monkeypatch):
    """A folder of one's own with a tiny data set in it, which is also the default."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    np.savez("tiny.npz", x_train=images, y_train=np.arange(24) % 3, x_test=images[:9], y_test=np.arange(9) % 3)
    parser_class = flags.RunParser

    class WithTinyDefaults(parser_class):
        def parse_args(self, argv=None, namespace=None):
            self.set_defaults(data="tiny.npz", model="lenet-300-100")
            return super().parse_args(argv, namespace)

    monkeypatch.setattr(flags, "RunParser", WithTinyDefaults)
    return tmp_path
