"""How alike masks and predictions are, and how good predictions: by hand."""

import math

import pytest
import torch

from sparselearning.reporting.comparisons import (
    accuracy,
    barrier,
    calibration_error,
    compare_layer,
    disagreement,
    jaccard,
    kl_divergence,
)


def mask(*bits):
    return torch.tensor(bits, dtype=torch.bool)


def test_jaccard_counts_over_all_layers_together():
    a, b = [mask(1, 1, 0, 0), mask(1, 1)], [mask(1, 0, 1, 0), mask(1, 1)]
    assert jaccard(a[:1], b[:1]) == 1 / 3
    assert jaccard(a, b) == 3 / 5
    assert jaccard(a, a) == 1
    assert jaccard([mask(0, 0)], [mask(0, 0)]) == 1
    assert jaccard([mask(1, 0)], [mask(0, 1)]) == 0


def test_disagreement_is_the_share_of_other_classes():
    a = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [5.0, 4.0]])
    b = torch.tensor([[9.0, 1.0], [3.0, 0.0], [1.0, 0.5], [4.0, 5.0]])
    assert disagreement(a, b) == 0.5
    assert disagreement(a, a) == 0


def test_kl_divergence_is_the_mean_over_samples_and_has_a_direction():
    even, uneven = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    there = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    back = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert kl_divergence(even, uneven) == pytest.approx(there, abs=1e-6)
    assert kl_divergence(uneven, even) == pytest.approx(back, abs=1e-6)
    both = torch.cat([even, uneven])
    assert kl_divergence(both, torch.cat([uneven, uneven])) == pytest.approx(there / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 3.0, 2.0], 1.5), ([1.0, 1.25, 2.0], 0.0), ([2.0, 2.0, 0.0], 1.0), ([1.0, 1.0, 1.0], 0.0)],
)
def test_barrier_is_the_rise_above_the_chord(values, expected):
    assert barrier([0.0, 0.5, 1.0], values) == expected


def test_layers_are_set_beside_random_masks_as_dense():
    half, quarter = mask(1, 1, 0, 0), mask(0, 1, 0, 0)
    row = compare_layer("fc", [half, quarter])
    # Random: 1/2 · 1/4 of the weights shared, 1/2 + 1/4 - 1/8 united.
    assert row.chance == pytest.approx((1 / 8) / (5 / 8))
    assert row.mean_overlap == 0.5
    assert row.densities == [0.5, 0.25]
    assert row.overlap == [[1.0, 0.5], [0.5, 1.0]]


def logits_of(*probabilities):
    """Two classes, of which the first gets these."""
    return torch.tensor([[p, 1 - p] for p in probabilities], dtype=torch.float64).log()


def test_accuracy_is_the_share_of_largest_logits_at_the_label():
    assert accuracy(logits_of(0.9, 0.2, 0.7, 0.6), torch.tensor([0, 1, 1, 0])) == 0.75


def test_calibration_error_by_hand():
    logits = logits_of(0.82, 0.84, 0.6, 0.3)
    labels = torch.tensor([0, 1, 0, 0])
    # Bin (12/15, 13/15] holds 0.82 (right) and 0.84 (wrong): |1/2 - 0.83|. 0.6 (right) is the last of (8/15, 9/15]:
    # |1 - 0.6|. 0.3 is 0.7 for the other class (wrong), in (10/15, 11/15]: |0 - 0.7|.
    expected = 2 / 4 * 0.33 + 1 / 4 * 0.4 + 1 / 4 * 0.7
    assert calibration_error(logits, labels) == pytest.approx(expected, abs=1e-9)


def test_confidence_that_is_right_as_often_as_it_says_is_calibrated():
    assert calibration_error(logits_of(*[0.75] * 4), torch.tensor([0, 0, 0, 1])) == pytest.approx(0, abs=1e-9)
    assert calibration_error(torch.tensor([[900.0, 0.0]]), torch.tensor([0])) == 0
    assert calibration_error(torch.tensor([[900.0, 0.0]]), torch.tensor([1])) == 1


def test_calibration_of_a_network_that_overflows_is_unknown():
    assert math.isnan(calibration_error(torch.tensor([[math.nan, 0.0], [1.0, 0.0]]), torch.tensor([0, 0])))
