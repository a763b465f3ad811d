"""Recipes: those that come with Pedigree, the checks across sections, and what a mistake is told."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from components.core.config import ConfigError, apply_overrides, load_yaml, validate
from components.model.vit import VisionTransformer
from components.recipe import PARAMS_FILE, RECIPES, Recipe, load_recipe, recipe_names
from components.training.schedules import Schedules

PROJECT = Path(__file__).parents[1]


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(PROJECT, "tiny-cpu", overrides)
    return str(caught.value)


def test_params_yaml_is_the_default_recipe():
    assert (PROJECT / PARAMS_FILE).read_text() == (RECIPES / "tiny-cpu.yaml").read_text()


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_says_what_it_is_for(name):
    recipe = load_recipe(PROJECT, name)
    assert isinstance(recipe, Recipe)
    head = (RECIPES / f"{name}.yaml").read_text().splitlines()[:6]
    assert head[0].startswith(f"# Recipe {name}: ")
    assert any("Hardware:" in line for line in head)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_written_out_reads_as_the_same(name, tmp_path):
    recipe = load_recipe(PROJECT, name)
    (tmp_path / PARAMS_FILE).write_text(yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True)))
    assert load_recipe(tmp_path, None) == recipe


def leaves(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def other_values(value: Any) -> list[Any]:
    """Values of which one is allowed where `value` is, if it is a number or a switch."""
    if isinstance(value, bool):
        return [not value]
    return [value + 1, value - 1, value / 2 or 0.5] if isinstance(value, int | float) else []


@pytest.mark.parametrize("name", recipe_names())
def test_setting_one_key_changes_only_that_key(name):
    """Also where a recipe gives its section in part, or not at all."""
    given = load_yaml(RECIPES / f"{name}.yaml")
    every = dict(leaves(as_dict(validate(Recipe, given, name))))
    changed = 0
    for key, value in every.items():
        (same,) = changes(given, key, [value], every)
        assert same == set(), f"{key}={value}, as it was, changed {same}"
        for touched in changes(given, key, other_values(value), every)[:1]:
            assert touched == {key}
            changed += 1
    assert changed > 80


def changes(given: dict[str, Any], key: str, values: list[Any], every: dict[str, Any]) -> list[set[str]]:
    """The keys that differ from `every` once `key` is set, for each value that is allowed."""
    found = []
    for value in values:
        try:
            recipe = validate(Recipe, apply_overrides(given, [f"{key}={json.dumps(value)}"]), "test")
        except ConfigError:
            continue
        now = dict(leaves(as_dict(recipe)))
        found.append({key for key in now.keys() | every.keys() if now.get(key) != every.get(key)})
    return found


def as_dict(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", by_alias=True)


@pytest.mark.parametrize(
    ("name", "millions", "learning_rate"),
    [
        ("own-images-gpu", 21.6, 4e-3 * (128 / 1024) ** 0.5),
        ("vitl16-in1k", 303, 4e-3 * 2**0.5),
        ("vitl14", 304, 3.5e-4),  # Table 16, at 3072
        ("vitg14-lvd142m", 1_136, 3.5e-4),
    ],
)
def test_recipes_have_the_published_sizes_and_rates(name, millions, learning_rate):
    config = load_recipe(PROJECT, name).pretrain
    with torch.device("meta"):
        backbone = VisionTransformer(config.backbone.trained_at(config.crops.global_size))
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert Schedules(config).at(config.optimizer.warmup_steps - 1).lr == pytest.approx(learning_rate, rel=0.015)


@pytest.mark.parametrize("name", ["own-images-gpu", "vitl16-in1k", "vitl14", "vitg14-lvd142m"])
def test_students_learn_at_the_papers_rate(name):
    config = load_recipe(PROJECT, name).distill
    peak = Schedules(config).at(config.optimizer.warmup_steps).lr
    assert peak == pytest.approx(1e-3 * (config.batch_size / 2048) ** 0.5)  # Table 16: 1e-3 at 2048


def test_overrides_are_set_and_typed():
    overrides = ("distill.steps=50", "pretrain.optimizer.base_lr=2e-3", "curate.target_images=null", "name=mine")
    recipe = load_recipe(PROJECT, "tiny-cpu", overrides)
    assert recipe.name == "mine"
    assert recipe.distill.steps == 50
    assert recipe.pretrain.optimizer.base_lr == 2e-3
    assert recipe.curate.target_images is None


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"^unknown recipe 'huge'; known recipes: .*tiny-cpu"):
        load_recipe(PROJECT, "huge")
    with pytest.raises(ConfigError, match=r"unknown recipe '\.\./params'"):
        load_recipe(PROJECT, "../params")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("pretrain.optimiser.base_lr=1e-3", "pretrain.optimiser: unknown key; did you mean 'optimizer'?"),
        ("pretrain.optimizer.base_lrr=1e-3", "pretrain.optimizer.base_lrr: unknown key; did you mean 'base_lr'?"),
        (
            "distill.students.small.bakbone.dim=8",
            "distill.students.small.bakbone: unknown key; did you mean 'backbone'?",
        ),
        (
            "distill.students.small.backbone.dept=8",
            "distill.students.small.backbone.dept: unknown key; did you mean 'depth'?",
        ),
        ("distil.steps=5", "distil: unknown key; did you mean 'distill'?"),
        ("distill.students.small.backbone.dept=5", "distill.students.small.backbone.dept: unknown key"),
        (
            "pretrain.optimizer.base_lr=-0.001",
            "pretrain.optimizer.base_lr: Input should be greater than 0 (given: -0.001)",
        ),
        ("pretrain.optimizer.base_lr=.inf", "pretrain.optimizer.base_lr: "),
        ("pretrain.steps=many", "pretrain.steps: "),
        ("pretrain.steps=0", "pretrain.steps: "),
        ("seed=-1", "seed: "),
        ("name=No Capitals", "name: "),
        ("pretrain", "--set pretrain: expected KEY=VALUE"),
        ("seed.x=1", "--set seed.x=1: seed is a value, not a section"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override, line):
    message = refused(override)
    assert line in message
    assert len(message.splitlines()) == 1


def test_several_mistakes_are_a_line_each():
    lines = refused("pretrain.optimizer.base_lr=-1", "distill.stepps=5").splitlines()
    assert len(lines) == 2
    assert all(line.startswith("tiny-cpu.yaml: ") for line in lines)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["evaluate.models={teacher: models/adapted}"], "evaluate.models must hold all that is registered"),
        (["evaluate.models.small=models/adapted"], "evaluate.models must hold all that is registered"),
        (["evaluate.models.other=models/students/other"], "this recipe makes no models/students/other"),
        (
            ["evaluate.preprocessing.crop_size=64"],
            "preprocessing.crop_size 64 is not a multiple of pretrain.backbone.patch_size 6; use for example 66",
        ),
        (["pretrain.crops.global_size=50"], "crops.global_size 50 is not a multiple of backbone.patch_size 6"),
        (
            ["adapt.crops.local_size=32"],
            "adapt.crops.local_size 32 is not a multiple of pretrain.backbone.patch_size 6; use for example 30",
        ),
        (
            ["distill.students.small.backbone={patch_size: 12, image_size: 48}"],
            "distill.students.small.backbone.patch_size is 12, that of the teacher (pretrain.backbone) is 6",
        ),
        (["curate.filters={max_nsfw: 0.8}"], "curate.filters.max_nsfw is 0.8, but embed scores no such thing"),
        (["curate.target_images=0"], "curate: target_images is 0 and there are no seed_sets, so no image is in"),
        (["curate.levels=[]"], "curate: levels is empty, but the balanced part"),
        (
            ["pretrain.steps=10", "pretrain.optimizer.warmup_steps=40"],
            "optimizer.warmup_steps is 40, more than the 10 steps of the run",
        ),
        (
            ["adapt.batch_size=3", "adapt.num_processes=2"],
            "adapt: batch_size 3 is not a multiple of num_processes 2; use for example 4",
        ),
        (["adapt.batch_size=1", "adapt.num_processes=2"], "use for example 4"),  # 2 would leave KoLeo no neighbor
    ],
)
def test_sections_must_agree(overrides, line):
    assert line in refused(*overrides)


def test_what_is_suggested_is_allowed():
    overrides = ("adapt.crops.local_size=32", "evaluate.preprocessing.crop_size=64", "adapt.batch_size=1")
    for override in overrides:
        key, given = override.split("=")
        more = ["adapt.num_processes=2"] if key == "adapt.batch_size" else []
        message = refused(override, *more)
        assert f"{key.rpartition('.')[2]} {given} " in message
        suggested = re.search(r"use for example (\d+)$", message.partition(" (given")[0])
        assert suggested
        load_recipe(PROJECT, "tiny-cpu", [f"{key}={suggested[1]}", *more])


def test_a_shorter_run_has_shorter_phases_unless_they_are_given(caplog):
    caplog.set_level("INFO")
    shorter = load_recipe(PROJECT, "vitl14", ["pretrain.steps=625", "pretrain.teacher.temp_warmup_steps=9"]).pretrain
    assert shorter.phases() == {
        "optimizer.warmup_steps": 100, "optimizer.freeze_last_layer_steps": 1, "optimizer.freeze_backbone_steps": 0,
        "teacher.temp_warmup_steps": 9,
    }  # fmt: skip
    assert caplog.messages == [
        "pretrain.steps is 625 instead of 625000, so in proportion: optimizer.warmup_steps 100000 -> 100, "
        "optimizer.freeze_last_layer_steps 1250 -> 1"
    ]
    recipe = load_recipe(PROJECT, "tiny-cpu", ["pretrain.steps=20", "distill.steps=2e1", "adapt.steps=100"])
    assert (recipe.pretrain.optimizer.warmup_steps, recipe.distill.optimizer.warmup_steps) == (1, 1)
    assert recipe.adapt.optimizer.warmup_steps == 2  # longer: as it is
    for section in ("pretrain.optimizer={warmup_steps: 40}", "pretrain.optimizer.warmup_steps=40"):
        assert "warmup_steps is 40, more than the 20 steps" in refused("pretrain.steps=20", section)


def test_the_pretrained_model_can_be_evaluated_too():
    assert load_recipe(PROJECT, "tiny-cpu", ["evaluate.models.pretrained=models/pretrained"])


def test_a_missing_section_and_files_that_are_no_recipe(tmp_path):
    values = yaml.safe_load((PROJECT / PARAMS_FILE).read_text())
    del values["adapt"]
    (tmp_path / PARAMS_FILE).write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"^params.yaml: adapt: required, but not given$"):
        load_recipe(tmp_path, None)
    (tmp_path / PARAMS_FILE).write_text("- a list\n")
    with pytest.raises(ConfigError, match="expected a mapping of sections, found list"):
        load_recipe(tmp_path, None)
    (tmp_path / PARAMS_FILE).write_text("a: [\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(tmp_path, None)
    (tmp_path / PARAMS_FILE).unlink()
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / PARAMS_FILE}: no such file")):
        load_recipe(tmp_path, None)
