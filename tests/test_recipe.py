"""Recipes: validation messages, inheritance, round trips."""

from pathlib import Path

import pytest
import yaml

from dllmquant.recipe import Recipe, RecipeError


def test_builtin_names_are_the_files_in_recipes():
    files = {path.stem for path in (Path(__file__).parent.parent / "recipes").glob("*.yaml")}
    assert set(Recipe.names()) == files
    assert {"rtn-w4a4", "gptq-w4a4", "dllmquant-w4a4"} <= files


@pytest.mark.parametrize("name", Recipe.names())
def test_builtin_recipes_are_valid_named_and_described(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.summary().startswith(f"W{recipe.weights.bits}A")


@pytest.mark.parametrize("name", Recipe.names())
def test_dict_and_yaml_round_trips_are_exact(name, tmp_path):
    recipe = Recipe.load(name)
    assert Recipe.load(recipe.to_dict()) == recipe
    path = tmp_path / "copy.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe


def test_extends_merges_sections_key_by_key(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: dllmquant-w4a4\nweights: {bits: 3}\n")
    recipe, parent = Recipe.load(path), Recipe.load("dllmquant-w4a4")
    assert recipe.name == "mine"
    assert recipe.weights == parent.weights.model_copy(update={"bits": 3})
    assert recipe.calibration == parent.calibration
    assert recipe.token_weights == parent.token_weights


def test_extends_finds_files_beside_the_recipe(tmp_path):
    (tmp_path / "base.yaml").write_text("weights: {bits: 2}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nseed: 7\n")
    recipe = Recipe.load(tmp_path / "child.yaml")
    assert (recipe.weights.bits, recipe.seed) == (2, 7)


def test_circular_extends_is_an_error(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(RecipeError, match="circle"):
        Recipe.load(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"weigths": {}}, r"weigths: unknown key; valid: version, name, .*weights"),
        ({"weights": {"bit": 4}}, r"weights\.bit: unknown key; valid: bits, group_size"),
        ({"calibration": {"stats": 1}}, r"calibration\.stats: unknown key; valid: states"),
        ({"weights": {"bits": 5}}, r"weights\.bits: .*2, 3, 4 or 8 \(got 5\)"),
        ({"weights": {"group_size": 0}}, r"weights\.group_size: .*got 0"),
        ({"weights": {"solver": "magic"}}, r"weights\.solver: .*'rtn', 'gptq'"),
        ({"weights": {"damping": -1}}, r"weights\.damping"),
        ({"version": 2}, r"version: .*1.*got 2"),
        ({"calibration": None}, r"calibration: null, but weights\.solver 'gptq' needs"),
        ({"weights": {"solver": "rtn"}}, r"calibration: nothing in this recipe uses data"),
        ({"weights": {"solver": "rtn", "act_order": True}, "calibration": None}, r"act_order"),
        ({"token_weights": {"kind": "cgq"}, "calibration": {"states": "clean"}}, r"token_weights\.kind: 'cgq'"),
        (
            {"weights": {"solver": "rtn"}, "calibration": None, "token_weights": {"kind": "cgq"}},
            r"calibration: null, but token_weights\.kind 'cgq' needs",
        ),
        ({"calibration": {"quotas": [0.5, 0.6]}}, r"quotas must be non-negative and sum to 1"),
        ({"calibration": {"quotas": [1.5, -0.5]}}, r"quotas"),
        ({"extends": "no-such-recipe"}, r"unknown name 'no-such-recipe'; built in: .*dllmquant-w4a4"),
        ({"extends": 3}, r"extends: 3"),
        ({"seed": -1}, r"seed"),
        ({"weights": {"mixed": {"mean": 4}}}, r"weights\.mixed: mean: 4; valid: 1 to 3"),
        ({"weights": {"mixed": {"choices": [2]}}}, r"choices: \[2\]; valid: two or more"),
        ({"weights": {"correction": 0.25}}, r"correction: 0\.25 has no meaning for solver 'gptq'; valid: 1"),
        (
            {"attention": {"probs_range": "search"}},
            "probs_range: 'search' needs search: true; valid without it: 'fixed'",
        ),
        ({"weights": {"mixed": {"mode": 1}}}, r"weights\.mixed\.mode: unknown key; valid: choices, mean"),
        ({"weights": {"mixed": {}, "group_size": None}}, r"mixed: needs a group_size"),
        ({"weights": {"clip": "awq"}}, r"clip: 'awq' goes with solver 'rtn'"),
        ({"weights": {"inputs": "quantized"}}, r"weights\.inputs: 'quantized', but activations is null"),
        ({"activations": {"allocation": {"mean_bits": 9}}}, r"allocation: mean_bits 9 .*valid: bits \(4\)"),
        ({"activations": {"allocation": {"mean": 9}}}, r"allocation\.mean: unknown key; valid: high_bits, mean_bits"),
        (
            {"activations": {"full_range": True, "symmetric": False}},
            "full_range: true with symmetric: false, whose range is always full; valid: false",
        ),
        ({"attention": {"probs_grid": "search"}}, r"probs_grid: 'search' needs search: true"),
        ({"attention": {"probs_bits": None, "value_bits": None}}, r"all null"),
        ({"transforms": [{"kind": "spinquant"}]}, r"transforms\.0: .*'spinquant'.*'smoothquant'"),
        (
            {"transforms": [{"kind": "duquant", "size": 4}]},
            r"transforms\.0\.duquant\.size: unknown key; valid: kind, sites",
        ),
        ({"transforms": [{"kind": "hadamard"}, {"kind": "wush"}]}, r"two of them at one input \(wush\)"),
        ({"transforms": [{"kind": "hadamard"}, {"kind": "quarot"}]}, r"'quarot' comes too late"),
        ({"transforms": [{"kind": "awq"}, {"kind": "quarot"}]}, r"'quarot' comes too late"),
    ],
)
def test_errors_name_the_field_and_the_valid_choices(document, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.load(document)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text", "a: [1", ""])
def test_files_that_are_not_mappings_are_errors(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        Recipe.load(path)


@pytest.mark.parametrize("name", ["nope", "../recipes/rtn-w4a4", "missing.yaml", ""])
def test_unknown_sources_are_errors(name):
    with pytest.raises(RecipeError, match="recipe"):
        Recipe.load(name)


def test_recipes_are_plain_data(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(RecipeError, match="not a YAML document"):
        Recipe.load(path)


def test_recipes_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Recipe.load("rtn-w4a4").seed = 3


def test_shipped_files_stay_short():
    for path in (Path(__file__).parent.parent / "recipes").glob("*.yaml"):
        assert len(yaml.safe_load(path.read_text())) <= 6, path
