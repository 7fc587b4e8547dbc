"""The study's commands make sense before hours are spent on them, and RESULTS.md says what results/ says."""

import functools
import itertools
import json
import re
import sys
from pathlib import Path

import main as imagenet_main
import numpy as np
import pytest

from helpers.written_runs import write_analysis, write_run

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import networks  # noqa: E402  found once its folder is on the path
import pages  # noqa: E402
import study  # noqa: E402
import sweep  # noqa: E402
import tiny_imagenet  # noqa: E402

from sparselearning import analyze, predict, report  # noqa: E402
from sparselearning.process import arguments  # noqa: E402
from sparselearning.process.errors import FaultError, UsageError  # noqa: E402
from sparselearning.reporting.runs import read_run  # noqa: E402
from sparselearning.training import flags  # noqa: E402
from sparselearning.training.plan import EpochBudget  # noqa: E402

EXPERIMENTS = [(name, experiment) for name, one in study.STUDIES.items() for experiment in one.experiments]


@pytest.mark.parametrize(("name", "experiment"), EXPERIMENTS)
def test_every_run_can_be_started_and_every_control_pairs_with_its_runs(name, experiment, tmp_path):
    one = study.STUDIES[name]
    seeds = one.experiments[experiment].seeds or one.seeds
    words = study.sweep_words(one, experiment, tmp_path / experiment, seeds)
    end = words.index("--")
    args = sweep.parse(words[:end])
    assert (args.seeds, args.control) == (list(seeds), one.experiments[experiment].control)
    for method in args.methods:
        run = sweep.main_suptickets.parse(sweep.planned(method, 41, words[end + 1 :], args.out, control=False).flags)
        assert run.cyclic_train
        assert "{" not in " ".join(words).replace("{seed}", "")
        if args.control:
            control = sweep.main_suptickets.parse(sweep.planned(method, 41, words[end + 1 :], args.out, True).flags)
            tickets = {"cyclic_train", "cycle_rate", "save"}
            assert {key for key, value in vars(run).items() if value != getattr(control, key)} == tickets


@pytest.mark.parametrize("name", ["cifar100-10k", "cifar100-20", "claim", "recipe"])
def test_cycles_alone_differ_from_main_in_flags_about_tickets(name):
    """From the networks of their own study or, to choose a recipe, of the one whose claim it is to improve."""
    source, folder = ("claim", Path("study/claim")) if name == "recipe" else (name, Path("work"))

    @functools.cache
    def parsed(experiment, name=name):
        words = study.sweep_words(study.STUDIES[name], experiment, Path("work") / experiment, [41])
        run = sweep.planned("granet", 41, words[words.index("--") + 1 :], Path("work") / experiment, control=False)
        return vars(sweep.main_suptickets.parse(run.flags))

    def pretrain_epochs(flags):
        return EpochBudget.of_share(flags["epochs"], flags["cycle_rate"], flags["cycle"]).pretrain_epochs

    again = [name for name in study.STUDIES[name].experiments if parsed(name)["resume"]]
    main = parsed("main", source)
    assert "again" in again
    for experiment in again:
        flags = parsed(experiment)
        assert flags["resume"] == folder / "main/granet/seed41/tickets/ticket_0.pth"
        asked = {key for key, value in flags.items() if value != main[key]} - {"save", "pre_train", "resume"}
        swa = {"lr_1", "superposing_method", "cycle_rate"} if experiment.startswith("swa") else set()
        assert asked <= {"re_explore", "large_death_rate", "no_maskupdates", "lr_2", "cycle"} | swa
        assert (asked == set()) == (experiment == "again")
        assert pretrain_epochs(flags) == pretrain_epochs(main)


def test_the_tuned_recipe_is_the_setting_that_was_tested():
    words = study.sweep_words(study.STUDIES["recipe-test"], "swa-rate-0.1", Path("work"), [61])
    tested = sweep.planned("granet", 61, words[words.index("--") + 1 :], Path("work"), control=False)
    given = ["--recipe", "tuned", "--update-frequency", "1000"]
    recipe, setting = (sweep.main_suptickets.parse(flags) for flags in (given, tested.flags))
    of_data = {"model", "batch_size", "update_frequency", "valid_split"}
    of_run = {"recipe", "indicate_method", "seed", "save", "ema", "keep_tickets"}
    without_effect = {"large_death_rate"}  # as nothing is explored
    differing = {name for name, value in vars(recipe).items() if value != getattr(setting, name)}
    assert differing == of_data | of_run | without_effect


def test_cycles_alone_need_networks_to_start_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = study.sweep_words(study.STUDIES["recipe"], "rate-0.1", Path("study/recipe/rate-0.1"), [41, 42])
    first, second = (Path(f"study/claim/main/granet/seed{seed}/tickets/ticket_0.pth") for seed in (41, 42))
    first.parent.mkdir(parents=True)
    first.touch()
    with pytest.raises(UsageError, match=rf"there is no {second} to start from: claim --only main trains it"):
        study.check_starts(words, [41, 42])
    study.check_starts(words, [41])


@pytest.mark.parametrize("method", tiny_imagenet.METHODS)
def test_runs_on_photographs_differ_from_their_controls_in_flags_about_tickets(method):
    run, control = (
        imagenet_main.parse([*tiny_imagenet.words_of(method, schedule, 41), "DIR"])
        for schedule in tiny_imagenet.SCHEDULES
    )
    for args, tickets in ((run, 2), (control, 0)):
        budget = imagenet_main.epoch_budget(args)
        assert (budget.pretrain_epochs + budget.cyclic_epochs, budget.tickets) == (20, tickets)
        assert not imagenet_main.check(args, budget)
    about_tickets = arguments.marked(imagenet_main.make_parser(), flags.ABOUT_TICKETS)
    assert {key for key, value in vars(run).items() if value != getattr(control, key)} <= about_tickets


def test_photographs_are_checked_trained_on_and_recorded(tmp_path, monkeypatch, capsys):
    """But for the training itself: finished runs are skipped, stopped ones resumed, and those that fail told."""
    monkeypatch.setattr(tiny_imagenet, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for (split, count), name in itertools.product((("train", 500), ("val", 50)), tiny_imagenet.CLASSES):
        (folder := tmp_path / "photographs" / split / name).mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.JPEG").touch()
    begun = []

    def execute(runs, gpus, stop_signal):
        for run in runs:
            begun.append(run.command())
            run.folder.path.exists() or write_run(
                run.folder.path, indicate_method=run.name.split()[0], seed=run.name.split()[-1]
            )
        runs[0].folder.summary.unlink(missing_ok=True)
        runs[0].folder.checkpoint.touch()
        return runs[:1]

    monkeypatch.setattr(sweep, "execute", execute)
    with pytest.raises(FaultError, match=r"1 of 12 \(rigl seed 41\)"):
        tiny_imagenet.main(["photographs"])
    assert len(begun) == 12
    assert len(study.find_runs([Path("results/tiny-imagenet")])) == 11
    begun.clear()
    with pytest.raises(FaultError):
        tiny_imagenet.main(["photographs"])
    (command,) = begun
    assert command[-3:] == ["study/tiny-imagenet-20", "--resume", "study/tiny-imagenet/rigl/seed41/checkpoint.pth"]
    (tmp_path / "photographs/val/n07871810/7.JPEG").unlink()
    with pytest.raises(UsageError, match="n07871810 has 49 JPEG files, not 50"):
        tiny_imagenet.main(["photographs"])


@pytest.mark.parametrize("classes", [100, 3])
def test_a_subset_is_balanced_whole_in_test_and_always_the_same(tmp_path, monkeypatch, classes):
    monkeypatch.chdir(tmp_path)
    labels = np.arange(50_000) * 7 % 100
    images = np.zeros((50_000, 2, 2, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(50_000) % 251, np.arange(50_000) // 251
    np.savez("all.npz", x_train=images, y_train=labels, x_test=images[:300], y_test=labels[:300])
    subset = study.Subset("part", classes, images_per_class=90)
    path = Path(study.prepared("all.npz", Path("data"), subset))
    assert path == Path("study/part.npz")
    part = np.load(path)
    assert np.bincount(part["y_train"]).tolist() == [90] * classes
    low, high = part["x_train"][:, 0, :, 0].astype(int).T
    places = 251 * high + low
    assert (np.diff(places) > 0).all()
    assert (part["y_train"] == labels[places]).all()
    assert np.bincount(part["y_test"]).tolist() == [3] * classes
    before = path.read_bytes()
    path.unlink()
    study.prepared("all.npz", Path("data"), subset)
    assert path.read_bytes() == before
    assert study.prepared("all.npz", Path("data"), None) == "all.npz"


def test_images_are_averaged_and_those_not_drawn_are_tested_on():
    images = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
    whole = study.cifar_data.Arrays(images, np.array([0, 0, 0, 1, 1, 1]), images[:2], np.array([0, 1]))
    part = study.Subset("part", 2, images_per_class=1, pixels=2, rest=slice(1)).of(whole)
    assert part.x_train.shape == (2, 2, 2, 3)
    assert part.x_test[0, 0, 0, 0] == 8  # of 0, 3, 12 and 15, 7.5 rounded to even
    assert part.y_test.tolist() == [0, 1, 0, 1]  # the test images, and one more of each class
    drawn = study.Subset("part", 2, images_per_class=1).of(whole).x_train
    rest = study.Subset("part", 2, images_per_class=1, rest=slice(2), test_images=False).of(whole)
    assert rest.y_test.tolist() == [0, 0, 1, 1]
    assert not (rest.x_test[:, None] == drawn[None]).all((2, 3, 4)).any()


def test_the_data_alone_can_be_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    images, labels = np.zeros((50_000, 16, 16, 3), np.uint8), np.arange(50_000) % 100
    np.savez_compressed(tmp_path / "all.npz", x_train=images, y_train=labels, x_test=images[:100], y_test=labels[:100])
    study.main(["claim", "--prepare", "--data", str(tmp_path / "all.npz")])
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["cifar100-claim.npz"]
    with np.load(tmp_path / "study/cifar100-claim.npz") as part:
        assert len(part["x_test"]) == 10 + 10 * 200
    assert not (tmp_path / "results").exists()
    with pytest.raises(UsageError, match="before the runs"):
        study.main(["claim", "--prepare", "--collect"])


@pytest.mark.parametrize(
    ("apart", "nearest", "hits", "ends"),
    [
        (1e-5, 3e-5, 90, "rounding changes no prediction."),
        (1e-5, 2e-5, 90, "rounding may change one."),
        (1e-5, 2e-5, 91, "rounding may change one. The run itself counted 91 hits, this command 90."),
    ],
)
def test_a_card_says_what_rounding_may_do(apart, nearest, hits, ends):
    assert networks.Agreement(90, 100, apart, nearest).sentence(hits).endswith(ends)


@pytest.mark.parametrize("name", study.STUDIES)
def test_networks_are_kept_of_experiments_with_a_subset(name):
    one = study.STUDIES[name]
    assert set(one.kept) <= set(one.experiments)
    assert one.subset or not one.kept


@pytest.mark.parametrize("subset", [study.TEN_THOUSAND, None])
def test_other_data_are_refused(tmp_path, monkeypatch, subset):
    monkeypatch.chdir(tmp_path)
    images = np.zeros((100, 2, 2, 3), np.uint8)
    np.savez("few.npz", x_train=images, y_train=np.arange(100), x_test=images, y_test=np.arange(100))
    with pytest.raises(UsageError, match="not CIFAR-100"):
        study.prepared("few.npz", Path("data"), subset)


def test_collecting_keeps_texts_of_finished_runs_alone(tmp_path):
    finished = write_run(tmp_path / "work/granet/seed1", network={"builder": "cifar_models:build_model"})
    write_analysis(finished, 0.0)
    (finished / "checkpoint.pth").write_bytes(b"weights")
    write_run(tmp_path / "work/granet/seed2", seed=2, finished=False)
    study.collect(tmp_path / "work", tmp_path / "kept")
    files = sorted(str(path.relative_to(tmp_path / "kept")) for path in (tmp_path / "kept").rglob("*.json*"))
    texts = ["analysis/analysis.json", "config.json", "metrics.jsonl", "summary.json", "tickets.jsonl"]
    assert files == [f"granet/seed1/{name}" for name in texts]
    assert "network" not in json.loads((tmp_path / "kept/granet/seed1/config.json").read_text())


def test_tables_are_filled_in_and_filled_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "results/a/seed1")
    text = (
        "# Title\n<!-- report results/a results/b -->\nold\n<!-- end -->\nwords <!-- report results/c --><!-- end -->\n"
    )
    once = pages.filled(text)
    assert "old" not in once
    assert "| GraNet |   1 |" in once
    assert "not run yet: results/b" in once
    assert "not run yet: results/c" in once
    assert once.startswith("# Title\n")
    assert pages.filled(once) == once


def test_a_headline_shows_runs_with_tickets_beside_their_control_by_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, final, plain in ((1, 0.9, 0.8), (2, 0.8, 0.76)):
        write_run(tmp_path / f"results/a/seed{seed}", final=final, seed=seed)
        write_run(tmp_path / f"results/plain/seed{seed}", final=plain, tickets=0, seed=seed)

    def cells(line):
        return [cell.strip() for cell in line.strip("|").split("|")]

    once = pages.filled("<!-- headline results/a results/plain results/b -->\nold\n<!-- end -->\n")
    comment, _, header, _, row, missing, _, end = once.splitlines()
    assert (comment, end) == ("<!-- headline results/a results/plain results/b -->", "<!-- end -->")
    assert cells(header) == [
        "method",
        "n",
        "plain training [%]",
        "superposed [%]",
        "over plain training [points], ± standard error",
    ]
    assert cells(row) == ["GraNet", "2", "78.00 ± 2.83", "85.00 ± 7.07", "+7.00 ± 3.00"]
    assert missing == "- not run yet: results/b"
    assert pages.filled(once) == once


def test_differences_stand_alone_or_in_the_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, tickets in (("a", 2), ("plain", 0)):
        write_analysis(write_run(tmp_path / f"results/{name}/seed1", tickets=tickets), 0.0, range(tickets + 1))
    text = "<!-- differences results/a -->\n<!-- end -->\n<!-- report results/a results/plain --><!-- end -->"
    once = pages.filled(text)
    brief, full = once.split("<!-- end -->")[:2]
    assert "| GraNet " in brief
    assert "| last superposition over plain training " not in brief
    assert "| last superposition over plain training " in full
    assert pages.filled(once) == once


def test_the_picture_shows_each_headline_under_its_heading(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        write_run(tmp_path / f"results/{name}/seed1", indicate_method=name)
    text = "## One\n<!-- headline results/a results/gone -->\n<!-- differences results/b -->\n"
    text += "## None\n<!-- report results/c -->\n### Two\n<!-- headline results/b -->\n"
    text += "<!-- headline results/c results/b -->\n### Three\n<!-- differences results/c results/a -->\n"
    settings = pages.groups_by_heading(text)
    assert {title: [group.label for group in groups] for title, groups in settings.items()} == {
        "One": ["a"], "Two": ["b", "c", "b"], "Three": ["c", "a"],
    }  # fmt: skip


def test_each_claim_is_one_sentence_whose_number_stands_where_it_links_to():
    text = (ROOT / "RESULTS.md").read_text()
    claims = re.findall(r"^\d\. (.*?)(?=^\d\. |\n\n)", text, re.DOTALL | re.MULTILINE)[:5]
    for claim in claims:
        sentence, page, anchor = re.fullmatch(r"(.*)\[table\]\((.*)#(.*)\)\)\.", claim.strip(), re.DOTALL).groups()
        (number,) = re.findall(r"[\d.]+ ± [\d.]+", sentence)
        linked = (ROOT / page).read_text() if page else text
        sections = re.split(r"^#+ ", linked, flags=re.MULTILINE)
        (section,) = [one for one in sections if one.partition("\n")[0].lower().replace(" ", "-") == anchor]
        assert f"{number} " in section, claim
    assert len(claims) == 5


def test_an_experiment_runs_is_analysed_and_collected(tmp_path, monkeypatch, capsys):
    """One experiment from its command line to RESULTS.md and the network to take away, on a few images.

    Then nothing is left to do.
    """
    labels = np.arange(50_000) % 100
    images = np.random.default_rng(0).integers(0, 255, (50_000, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "all.npz", x_train=images, y_train=labels, x_test=images[:100], y_test=labels[:100])
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(analyze, "draw", lambda results, out: None)  # pictures that are not collected

    def execute(runs, *_):
        for run in runs:  # in this process, which has imported it all
            sweep.main_suptickets.main(run.flags)
        return []

    monkeypatch.setattr(sweep, "execute", execute)
    small = study.Study(
        "--pre_train --cyclic_train --epochs 2 --cycle 1 --cycle_rate 0.5 --final-density 0.3 --final-prune-epoch 1 "
        "--model lenet-300-100 --batch-size 100 --keep-tickets --execution masked",
        {"main": study.Experiment(["rigl"], control=True)},
        seeds=(5, 6), subset=study.Subset("part", 100, images_per_class=10), kept=["main"],
    )  # fmt: skip
    monkeypatch.setitem(study.STUDIES, "cifar100", small)
    (tmp_path / "RESULTS.md").write_text(
        "<!-- report results/cifar100/main -->\n<!-- end -->\n<!-- headline results/cifar100/main -->\n<!-- end -->\n"
    )
    study.main(["cifar100", "--seeds", "5", "--data", str(tmp_path / "all.npz")])
    assert (tmp_path / "results/gains.png").is_file()
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| rigl, plain" in text
    assert "CAA, BatchNorm averaged" in text
    config = json.loads((tmp_path / "results/cifar100/main/rigl/seed5/config.json").read_text())
    assert config["save"] == "study/cifar100/main/rigl/seed5"
    assert (tmp_path / "results/cifar100/main/rigl-control/seed5/analysis/analysis.json").is_file()

    card = (tmp_path / "results/networks/cifar100-rigl/README.md").read_text()
    assert config["command"] in card
    accuracy = json.loads((tmp_path / "results/cifar100/main/rigl/seed5/summary.json").read_text())["final_acc"]
    (promised,) = re.findall(r"ends with `(accuracy .*?)`", card)
    assert promised == f"accuracy {100 * accuracy:.2f} % of 100 images"
    (words,) = re.findall(r"python -m sparselearning.predict (.*)", card)
    capsys.readouterr()
    predict.main(words.split())
    assert capsys.readouterr().err == f"{promised}\n"

    monkeypatch.setattr(sweep, "execute", lambda runs, *_: list(runs))
    study.main(["cifar100", "--collect"])
    assert (tmp_path / "RESULTS.md").read_text() == text


def test_collecting_is_content_with_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    (tmp_path / "RESULTS.md").write_text("<!-- report results/cifar100/main --><!-- end -->")
    study.main(["cifar100", "--collect"])
    assert "not run yet" in (tmp_path / "RESULTS.md").read_text()


def test_results_say_what_the_kept_files_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    read = functools.cache(read_run)
    for page in pages.PAGES:
        assert pages.filled(page.read_text(), read) == page.read_text()
    text = Path("docs/results-appendix.md").read_text()
    folders = re.search(r"<!-- report ([^>]*?) -->", text)[1].split()
    report.main([*folders, "--out", str(tmp_path), "--no-plots"])
    assert (tmp_path / "results.md").read_text() in text
