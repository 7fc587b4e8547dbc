"""Superposing again, by hand."""

import pytest
import torch

from sparselearning.reporting.bench import Network, superpose_again
from sparselearning.sparse.superpose import AVERAGING


def network(values, name="n", epoch=0):
    state = {"w": torch.tensor(values)}
    return Network(name, state, {"w": state["w"] != 0}, epoch)


def not_asked(network):
    raise AssertionError("an average with one factor needs no accuracy")


def test_a_greedy_average_takes_the_first_of_the_best_factors():
    members = [network([8.0, 0.0]), network([0.0, 4.0]), network([0.0, 0.0])]
    first, second = superpose_again(
        members, AVERAGING["greedy"](0.5), ["w"], None, lambda made: float(made.state["w"][1] >= 1)
    )
    assert first.state["w"].tolist() == pytest.approx([5.6, 1.2]), "0.3: 0.1 makes it 0.4, too little"
    assert second.state["w"].tolist() == first.state["w"].tolist(), "0: the ticket is left out"


def test_averages_by_hand():
    members = [network([8.0, 0.0, 4.0, 1.0]), network([0.0, 4.0, 4.0, 1.0]), network([4.0, 8.0, 0.0, 1.0])]
    cima = superpose_again(members, AVERAGING["CIMA"](0.5), ["w"], None, not_asked)
    assert [made.state["w"].tolist() for made in cima] == [[4, 2, 4, 1], [4, 5, 2, 1]]
    caa = superpose_again(members, AVERAGING["CAA"](0.5), ["w"], None, not_asked)[-1]
    torch.testing.assert_close(caa.state["w"], torch.tensor([4.0, 4.0, 8 / 3, 1.0]))


def test_every_superposition_is_pruned_before_the_next_ticket_enters():
    members = [network([8.0, 0.0, 3.0, 1.0]), network([0.0, 4.0, 4.0, 1.0]), network([4.0, 8.0, 0.0, 1.0])]
    first, second = superpose_again(members, AVERAGING["CIMA"](0.5), ["w"], 0.5, not_asked)
    assert first.state["w"].tolist() == [4, 0, 3.5, 0]
    assert first.masks["w"].tolist() == [True, False, True, False]
    assert second.state["w"].tolist() == [4, 4, 0, 0]
