"""A run's config.json leads to the script that made it, and to nothing else."""

import sys
from pathlib import Path

import pytest

from sparselearning.process.errors import UsageError
from sparselearning.training.scripts import script_of

CONFIG = Path("run/config.json")


@pytest.mark.parametrize(("builder", "flag"), [("cifar_models:build_model", "model"), ("imagenet_resnet:f", "arch")])
def test_the_script_beside_the_networks(builder, flag):
    script = script_of({"network": {"builder": builder}}, CONFIG)
    assert flag in vars(script.make_parser().parse_args(["data"] * (flag == "arch")))
    assert script_of({"network": {"builder": builder}}, CONFIG) is script


def test_another_main_on_the_path_is_none_of_this(tmp_path, monkeypatch):
    (tmp_path / "main.py").write_text("raise AssertionError('this is the main of another project')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name == "main" or name.startswith("main_suptickets of")]:
        monkeypatch.delitem(sys.modules, name)
    script = script_of({"network": {"builder": "imagenet_resnet:build_model"}}, CONFIG)
    assert vars(script.make_parser().parse_args(["data"]))["arch"] == "resnet50"


def test_a_folder_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text("raise AssertionError('nothing needs this imported')\n")
    (tmp_path / "main_suptickets.py").write_text("def make_parser():\n    return 'mine'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert script_of({"network": {"builder": "my_networks:build"}}, CONFIG).make_parser() == "mine"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"network": "cifar_models:build_model"},
        {"network": {}},
        *(
            {"network": {"builder": name}}
            for name in ("no_such_module:f", "json:loads", "sys:exit", "__main__:f", "..:f", "", None)
        ),
    ],
)
def test_what_leads_nowhere(config):
    with pytest.raises(UsageError, match=r"config\.json does not lead to the script .* PYTHONPATH"):
        script_of(config, CONFIG)
