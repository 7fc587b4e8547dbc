"""Fixtures of the tests of reports."""

import pytest

from helpers.written_runs import write_run


@pytest.fixture
def study(tmp_path):
    """Seeds 1 and 2: 92 and 94 % with tickets, 91 and 91 % without; seed 1 of RigL: 90 %."""
    for seed, final, plain in ((1, 0.92, 0.91), (2, 0.94, 0.91)):
        write_run(tmp_path / f"a_tickets/seed{seed}", final, seed=seed)
        write_run(tmp_path / f"b_plain/seed{seed}", plain, tickets=0, seed=seed)
    write_run(tmp_path / "c_rigl/seed1", 0.90, method="DST")
    return tmp_path


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib")
    from sparselearning.reporting import plots

    return plots
