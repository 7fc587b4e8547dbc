"""Tickets, superpositions, the held-out test set, the moving average: against the rules written plainly."""

import copy
import dataclasses
import json

import pytest
import torch

from helpers.comparing import differing, lines, plain
from helpers.small_runs import (
    DENSE,
    MASKABLE,
    MASKING,
    OPTIMIZERS,
    PLAN,
    TOTAL,
    Batches,
    Signals,
    mixed,
    network,
    non_zeros,
    prepare,
    record_steps,
    result,
    set_up,
    sparse,
    ticket_states,
)
from helpers.tensors import prune_by_sorting
from sparselearning.process.files import load_torch
from sparselearning.process.signals import Stopped
from sparselearning.sparse.superpose import AVERAGING
from sparselearning.training import experiment
from sparselearning.training.engine import Trainer
from sparselearning.training.experiment import Output
from sparselearning.training.networks import SavedNetwork
from sparselearning.training.plan import EpochBudget
from sparselearning.training.progress import run_table
from sparselearning.training.run_folder import RunFolder
from sparselearning.training.runtime import Runtime

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

# ------------------------------------------------------------------------------------- tickets and superpositions


@pytest.mark.parametrize("update_bn", [False, True])
@pytest.mark.parametrize(("method", "factors"), [("CIMA", [0.3, 0.3]), ("CAA", [1 / 2, 1 / 3])])
def test_superpositions_follow_the_rule(tmp_path, method, factors, update_bn):
    plan = dataclasses.replace(PLAN, averaging=AVERAGING[method](0.3), update_bn=update_bn)
    trainer = prepare(tmp_path, plan, keep_tickets=True)
    trainer.run()
    assert [row["factor"] for row in lines(trainer.folder.tickets)] == pytest.approx(factors)
    state, *tickets = ticket_states(trainer.folder, 2)
    model = network(0.0)
    for number, (ticket, factor) in enumerate(zip(tickets, factors, strict=True), start=1):
        union = mixed(state, ticket, factor)
        assert lines(trainer.folder.tickets)[number - 1]["union_density"] == non_zeros(union) / TOTAL
        state = prune_by_sorting(union, MASKABLE, round(TOTAL * 0.2))
        if update_bn:
            model.load_state_dict(state)
            batches = [b.images for b in trainer.sources.train.epoch(2 * number + 1)]  # the cycle's last epoch
            torch.optim.swa_utils.update_bn(batches, model)
            state = copy.deepcopy(model.state_dict())
    final = load_torch(trainer.folder.previous)
    for name, expected in state.items():
        torch.testing.assert_close(final["state_dict"][name], expected, rtol=1e-6, atol=1e-7, msg=name)
    for name, mask in final["masks"].items():
        assert torch.equal(mask, state[name] != 0)


GREEDY = dataclasses.replace(PLAN, averaging=AVERAGING["greedy"](0.5))


@pytest.mark.parametrize("update_bn", [False, True])
def test_a_greedy_superposition_is_the_best_of_all_factors(tmp_path, update_bn):
    trainer = prepare(tmp_path, dataclasses.replace(GREEDY, update_bn=update_bn), keep_tickets=True)
    trainer.run()
    state, *tickets = ticket_states(trainer.folder, 2)
    evaluation, model, chosen = trainer.sources.evaluation, network(0.0), []
    for number, ticket in enumerate(tickets, start=1):
        tried = []
        for factor in (0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95):
            model.load_state_dict(prune_by_sorting(mixed(state, ticket, factor), MASKABLE, round(TOTAL * 0.2)))
            if update_bn:
                batches = [b.images for b in trainer.sources.train.epoch(2 * number + 1)]
                torch.optim.swa_utils.update_bn(batches, model)
            with torch.no_grad():
                hits = (model.eval()(evaluation.images).argmax(1) == evaluation.labels).sum().item()
            tried.append((hits / len(evaluation.labels), -factor, copy.deepcopy(model.state_dict())))
        accuracy, minus_factor, state = max(tried, key=lambda made: made[:2])
        chosen.append(-minus_factor)
        row = lines(trainer.folder.tickets)[number - 1]
        assert (row["factor"], row["superposed_acc"]) == (-minus_factor, accuracy)
        assert row["density"] <= round(TOTAL * 0.2) / TOTAL
    assert any(chosen), "a case in which leaving all tickets out is not the best"
    final = load_torch(trainer.folder.previous)
    for name, mask in final["masks"].items():
        assert torch.equal(mask, state[name] != 0)
        torch.testing.assert_close(final["state_dict"][name], state[name], rtol=1e-6, atol=1e-7, msg=name)


def test_a_greedy_superposition_leaves_a_ticket_out_that_changes_nothing(tmp_path):
    plan = dataclasses.replace(GREEDY, pretrain_lr=lambda epoch: 0.0, cycle_lr=None, explore_rate=None)
    trainer = prepare(tmp_path, plan, None)
    trainer.run()
    assert [row["factor"] for row in lines(trainer.folder.tickets)] == [0, 0]


def test_every_factor_that_a_greedy_superposition_tries_costs_a_bn_pass(tmp_path):
    spent = []
    for plan in (PLAN, GREEDY):
        trainer = prepare(tmp_path / str(len(spent)), dataclasses.replace(plan, final_density=None))
        trainer.run()
        spent.append(lines(trainer.folder.tickets)[0]["bn_flops"])
    # Without pruning all unions are as dense as the one with CIMA, but for that without the ticket, S itself.
    assert 7 * spent[0] < spent[1] < 8 * spent[0]


def test_a_greedy_run_stopped_among_its_factors_equals_one_without_stops(tmp_path):
    plan = dataclasses.replace(GREEDY, budget=EpochBudget(1, 1, 1))
    counter = Signals()
    trainer = prepare(tmp_path / "whole", plan, signals=counter, dropout=0.4)
    whole = result(trainer, trainer.run())
    for at in (counter.looks - 30, counter.looks - 3):
        folder = tmp_path / str(at)
        with pytest.raises(Stopped):
            prepare(folder, plan, signals=Signals(at), dropout=0.4).run()
        resumed = prepare(folder, plan, resume=folder, dropout=0.4)
        assert resumed.at.trained
        assert not differing(whole, result(resumed, resumed.run()))


@pytest.mark.parametrize("method", ["CIMA", "CAA"])
def test_one_cycle_without_pruning_is_the_plain_mixture(tmp_path, method):
    plan = dataclasses.replace(DENSE, budget=EpochBudget(1, 2, 1), averaging=AVERAGING[method](0.5), update_bn=False)
    trainer = prepare(tmp_path, plan, None, keep_tickets=True)
    trainer.run()
    pretrained, ticket = ticket_states(trainer.folder, 1)
    for name, entry in load_torch(trainer.folder.previous)["state_dict"].items():
        expected = (pretrained[name] + ticket[name]) / 2 if entry.is_floating_point() else ticket[name]
        torch.testing.assert_close(entry, expected, rtol=1e-6, atol=1e-8, msg=name)


def test_caa_without_pruning_is_the_mean_of_all_members(tmp_path):
    plan = dataclasses.replace(DENSE, budget=EpochBudget(1, 1, 3), averaging=AVERAGING["CAA"](0.9), update_bn=False)
    trainer = prepare(tmp_path, plan, None, keep_tickets=True)
    trainer.run()
    members = ticket_states(trainer.folder, 3)
    for name, entry in load_torch(trainer.folder.previous)["state_dict"].items():
        if entry.is_floating_point():
            expected = torch.stack([member[name].double() for member in members]).mean(0).float()
            torch.testing.assert_close(entry, expected, rtol=1e-5, atol=1e-7, msg=name)


def test_a_constant_rate_and_caa_of_every_epoch_are_swa_as_pytorch_does_it(tmp_path):
    """Izmailov et al. 2018, algorithm 1: the first network is a member of the average, too."""
    prepare(tmp_path / "first", dataclasses.replace(PLAN, cyclic_train=False), keep_tickets=True).run()
    start = RunFolder(tmp_path / "first").ticket(0)
    plan = dataclasses.replace(
        PLAN, budget=EpochBudget(2, 1, 3), pre_train=False, averaging=AVERAGING["CAA"](0.5), cycle_lr=(0.03, 0.03),
        explore_rate=None, updates_in_cycles=False,
    )  # fmt: skip
    trainer = prepare(tmp_path / "swa", plan, resume=start)
    trainer.run()

    model, first = network(0.0), load_torch(start)["state_dict"]
    model.load_state_dict(first)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.03, anneal_epochs=0)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    for epoch in range(2, 5):
        for batch in trainer.sources.train.epoch(epoch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch.images), batch.labels).backward()
            optimizer.step()
            for name in MASKABLE:
                model.get_parameter(name).data.mul_(first[name] != 0)
        schedule.step()
        averaged.update_parameters(model)
    torch.optim.swa_utils.update_bn(trainer.sources.train.epoch(4), averaged)

    final = load_torch(trainer.folder.previous)["state_dict"]
    assert all(torch.equal(final[name] != 0, first[name] != 0) for name in MASKABLE)
    for name, entry in averaged.module.state_dict().items():
        if entry.is_floating_point():
            torch.testing.assert_close(final[name], entry, rtol=1e-4, atol=1e-6, msg=name)
    assert (averaged.module[0].weight - first["0.weight"]).abs().max() > 0.001, "something was learned"


def test_reported_accuracies_are_those_of_the_saved_networks(tmp_path):
    trainer = prepare(tmp_path, keep_tickets=True)
    summary = trainer.run()
    evaluation = trainer.sources.evaluation

    def accuracy(state):
        model = network(0.0).eval()
        model.load_state_dict(state)
        with torch.no_grad():
            return (model(evaluation.images).argmax(1) == evaluation.labels).double().mean().item()

    pretrained, *tickets = ticket_states(trainer.folder, 2)
    assert summary.pretrain_acc == accuracy(pretrained)
    assert summary.ticket_acc == [accuracy(ticket) for ticket in tickets]
    assert summary.final_acc == accuracy(load_torch(trainer.folder.previous)["state_dict"])
    assert trainer.evaluate_superposition(evaluation)[1] == summary.final_acc


@pytest.mark.parametrize("explore_rate", [None, 0.4])
def test_training_goes_on_from_the_ticket(tmp_path, explore_rate):
    trainer = prepare(tmp_path, dataclasses.replace(PLAN, explore_rate=explore_rate), keep_tickets=True)
    parameters = list(trainer.model.parameters())
    seen = record_steps(trainer)
    trainer.run()
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(parameters, trainer.model.parameters(), strict=True))
    assert all(a is b for a, b in zip(parameters, held, strict=True))
    before_cycle_2 = next(before for position, _, before, _, _ in seen if position == (4, 0))
    after_first_step = next(after for position, _, _, after, _ in seen if position == (4, 0))
    ticket = ticket_states(trainer.folder, 2)[1]
    for name, entry in ticket.items():
        if name in MASKABLE and explore_rate is not None:
            kept = before_cycle_2[name] != 0
            assert torch.equal(before_cycle_2[name][kept], entry[kept])  # exploration moves masks, not values
        else:
            assert torch.equal(before_cycle_2[name], entry), name
    assert any(not torch.equal(after_first_step[name], before_cycle_2[name]) for name in MASKABLE)
    assert plain(load_torch(trainer.folder.current)["state_dict"]) == plain(trainer.model.state_dict())


def test_masked_weights_and_momentum_are_zero_after_every_step(tmp_path):
    for optimizer in OPTIMIZERS:
        trainer = prepare(tmp_path / optimizer, optimizer=optimizer, masks=MASKING | {"growth": "random"})
        step = trainer.train_batch

        def train_batch(batch, trainer=trainer, step=step):
            step(batch)
            for name, weight in trainer.model.named_parameters():
                if name in MASKABLE:
                    for state in [weight, *trainer.optimizer.state[weight].values()]:
                        if state.shape == weight.shape:
                            assert not state[~trainer.masking.masks[name]].any()

        trainer.train_batch = train_batch
        trainer.run()


# --------------------------------------------------------------------------------------------- the test set


def test_the_test_set_is_touched_once_at_the_end(tmp_path, capsys):
    test = Batches(7, 4, seed=2)
    brought = set_up(test=test)
    folder = RunFolder(tmp_path / "run")
    touched_before = []
    evaluate = Trainer.evaluate_superposition
    try:
        Trainer.evaluate_superposition = lambda self, source: (
            touched_before.append((test.passes, len(self.measurements.results.tickets))) or evaluate(self, source)
        )
        summary = experiment.run(brought, PLAN, sparse(), Runtime(amp="off"), Output(folder, {}))
    finally:
        Trainer.evaluate_superposition = evaluate
    assert test.passes == 1
    assert touched_before == [(0, 2)]
    model = network(0.0).eval()
    model.load_state_dict(load_torch(folder.previous)["state_dict"])
    with torch.no_grad():
        expected = (model(test.images).argmax(1) == test.labels).double().mean().item()
    assert summary.test_acc == expected == json.loads(folder.summary.read_text())["test_acc"]
    assert "on the test set" in capsys.readouterr().out


@pytest.mark.parametrize(("plan", "masks"), [(PLAN, MASKING), (DENSE, None)], ids=["sparse", "dense"])
def test_the_moving_average_is_pruned_and_measured_as_the_result_is(tmp_path, plan, masks, capsys):
    decay, test, kept = 0.8, Batches(17, 8, seed=2), []
    trainer = prepare(tmp_path / "run", dataclasses.replace(plan, ema_decay=decay), masks, test=test)
    train_batch = trainer.train_batch

    def keep_weights(batch):
        train_batch(batch)
        kept.append({name: entry.double().clone() for name, entry in trainer.model.state_dict().items()})

    trainer.train_batch = keep_weights
    summary = trainer.run()
    average = kept[0]
    for state in kept[1:]:
        average = {name: decay * average[name] + (1 - decay) * entry for name, entry in state.items()}
    average = {name: entry.float() for name, entry in average.items()}
    model = network(0.0)
    model.load_state_dict(prune_by_sorting(average, MASKABLE, round(TOTAL * 0.2)) if masks else average)
    torch.optim.swa_utils.update_bn([b.images for b in trainer.sources.train.epoch(6)], model)
    for found, images in ((summary.ema_acc, trainer.sources.evaluation), (summary.ema_test_acc, test)):
        with torch.no_grad():
            hits = (model.eval()(images.images).argmax(1) == images.labels).sum().item()
        assert found == hits / len(images.labels)
    for name, entry in trainer.average.average.items():
        if "running" not in name:
            torch.testing.assert_close(entry, average[name], rtol=1e-5, atol=1e-6)
    written = SavedNetwork.read(trainer.folder.ema)
    assert written.epoch == 6
    assert set(written.masks) == set(MASKABLE if masks else ())
    for name, entry in written.state_dict.items():
        torch.testing.assert_close(entry, model.state_dict()[name], rtol=1e-4, atol=1e-5)
    print(run_table(summary, tmp_path))
    assert f"moving average{summary.ema_acc:18.2%}" in capsys.readouterr().out


def test_training_with_a_moving_average_is_training_without_it(tmp_path):
    results = []
    for decay in (None, 0.9):
        trainer = prepare(tmp_path / str(decay), dataclasses.replace(PLAN, ema_decay=decay), dropout=0.4)
        results.append(result(trainer, trainer.run()))
    results[1]["summary"].pop("ema_acc")
    assert not differing(*results)


def test_a_stop_while_the_moving_average_is_measured_changes_nothing(tmp_path):
    plan = dataclasses.replace(PLAN, budget=EpochBudget(1, 1, 0), ema_decay=0.8)
    counter = Signals()
    trainer = prepare(tmp_path / "whole", plan, signals=counter, dropout=0.4)
    whole = result(trainer, trainer.run())
    for at in range(counter.looks - 4, counter.looks + 1):
        folder = tmp_path / str(at)
        with pytest.raises(Stopped):
            prepare(folder, plan, signals=Signals(at), dropout=0.4).run()
        resumed = prepare(folder, plan, resume=folder, dropout=0.4)
        assert resumed.at.epoch == 1
        assert not differing(whole, result(resumed, resumed.run()))
