"""Recipes: validation messages, inheritance, round trips."""

from pathlib import Path

import pytest
import yaml

from dllmquant.recipe import Recipe, RecipeError


def test_builtin_names_are_the_files_in_recipes():
    files = {path.stem for path in (Path(__file__).parent.parent / "recipes").glob("*.yaml")}
    assert set(Recipe.names()) == files
    assert {"rtn-w4a4", "gptq-w4a4", "dllmquant-w4a4"} <= files


def test_every_method_has_the_common_settings():
    settings = ("w4a16", "w3a16", "w4a8", "w4a4", "w4a4-av")
    methods = {name.removesuffix("-w4a4") for name in Recipe.names() if name.endswith("-w4a4")}
    assert {f"{method}-{setting}" for method in methods for setting in settings} <= set(Recipe.names())
    assert {f"{name}-w8a8" for name in ("rtn", "gptq", "smoothquant", "dllmquant")} <= set(Recipe.names())


@pytest.mark.parametrize("setting", ["w4a16", "w3a16", "w4a8", "w4a4", "w4a4-av"])
def test_published_recipes_leave_out_what_is_ours_of_ia_aq(setting):
    ours, published = (Recipe.load(f"dllmquant-quarot-{variant}{setting}") for variant in ("", "published-"))
    assert [transform.kind for transform in ours.transforms] == ["quarot", "iaaq", "hadamard"]
    own = {"name": published.name, "description": published.description}
    own |= {"transforms": (ours.transforms[0], ours.transforms[2])}
    if setting == "w4a4-av":
        grid = {"probs_grid": "uniform", "probs_range": "fixed"}
        own |= {"attention": ours.attention.model_copy(update=grid)}
    assert ours.model_copy(update=own) == published


@pytest.mark.parametrize("name", ["best-w4a16", "best-w4a8"])
def test_best_recipes_differ_in_their_activations_only(name):
    recipe, parent = Recipe.load(name), Recipe.load("best-w4a4")
    own = {"name": name, "description": recipe.description, "activations": recipe.activations}
    assert parent.model_copy(update=own) == recipe
    assert recipe.activations != parent.activations


@pytest.mark.parametrize("name", Recipe.names())
def test_builtin_recipes_are_valid_named_and_described(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.summary().startswith(f"W{recipe.weights.bits}A")


@pytest.mark.parametrize(
    ("name", "grid"),
    [("best-w4a4", "asymmetric activations per group of 32"), ("quarot-w4a4", "activations per token")],
)
def test_summary_tells_the_grid_of_activations(name, grid):
    assert grid in Recipe.load(name).summary().split(", ")


@pytest.mark.parametrize("name", Recipe.names())
def test_dict_and_yaml_round_trips_are_exact(name, tmp_path):
    recipe = Recipe.load(name)
    assert Recipe.load(recipe.to_dict()) == recipe
    path = tmp_path / "copy.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe


@pytest.mark.parametrize("name", Recipe.names())
def test_protocols_of_the_builtin_recipes(name):
    setting = name.split("-", 1)[1].removeprefix("awq-").removeprefix("quarot-")
    expected = "linear+av" if setting.endswith("-av") else "weights" if setting.endswith("a16") else "linear"
    assert Recipe.load(name).protocol == expected


@pytest.mark.parametrize(
    ("probs", "values", "queries", "inside"),
    [
        (4, 4, None, "+av"),
        (4, None, None, "+a"),
        (None, 8, None, "+v"),
        (None, None, 8, "+qk"),
        (8, 8, 8, "+av+qk"),
        (None, 4, 4, "+v+qk"),
    ],
)
@pytest.mark.parametrize(("activations", "outside"), [(None, "weights"), ({"bits": 4}, "linear")])
def test_protocols_name_what_is_quantized(probs, values, queries, inside, activations, outside):
    attention = {"probs_bits": probs, "value_bits": values, "query_key_bits": queries}
    recipe = Recipe.load({"extends": "rtn-w4a4", "activations": activations, "attention": attention})
    assert recipe.protocol == outside + inside
    assert recipe.summary().endswith(f"attention quantized ({outside}{inside})")


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
        (
            {"attention": {"rotate_query_key": True}},
            r"attention: rotate_query_key: true has no effect without query_key_bits; valid: false",
        ),
        (
            {"token_weights": {"kind": "cgq_text"}, "calibration": {"states": "random_t"}},
            r"token_weights\.kind: 'cgq_text', but calibration\.states 'random_t' .*valid: 'cgq', or states",
        ),
        (
            {"token_weights": {"kind": "cgq", "waiting_confidence": "zero"}, "calibration": {"states": "random_t"}},
            r"waiting_confidence: 'zero', but calibration\.states 'random_t' have no blocks; valid: 'model', or",
        ),
        (
            {"token_weights": {"kind": "frontier", "waiting_confidence": "zero"}},
            r"token_weights: waiting_confidence: 'zero' has no meaning for kind 'frontier'; valid: 'model'",
        ),
        (
            {"token_weights": {"kind": "cgq_text"}, "calibration": {"states": "mcs"}},
            r"token_weights\.kind: 'cgq_text', but calibration\.states 'mcs'",
        ),
        (
            {
                "activations": {"allocation": {"mean_bits": 5, "objective": "logits"}},
                "calibration": {"states": "clean"},
            },
            r"allocation\.objective: 'logits' measures masked positions, .*'clean' .*valid: 'output', or other states",
        ),
        ({"attention": {"probs_bits": None, "value_bits": None}}, r"all null"),
        ({"transforms": [{"kind": "spinquant"}]}, r"transforms\.0: .*'spinquant'.*'smoothquant'"),
        (
            {"transforms": [{"kind": "duquant", "size": 4}]},
            r"transforms\.0\.duquant\.size: unknown key; valid: kind, sites",
        ),
        ({"transforms": [{"kind": "hadamard"}, {"kind": "wush"}]}, r"two of them at one input \(wush\)"),
        ({"transforms": [{"kind": "hadamard"}, {"kind": "quarot"}]}, r"'quarot' comes too late"),
        ({"transforms": [{"kind": "awq"}, {"kind": "quarot"}]}, r"'quarot' comes too late"),
        ({"transforms": [{"kind": "hadamard"}, {"kind": "iaaq"}]}, r"'iaaq' comes too late"),
        ({"transforms": [{"kind": "iaaq"}]}, r"'iaaq' scales inputs that a 'hadamard' rotates"),
    ],
)
def test_errors_name_the_field_and_the_valid_choices(document, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.load(document)


RTN = {"solver": "rtn"}
ALLOCATED = {"activations": {"allocation": {"mean_bits": 5}}}


def weighted(kind="cgq", weights=RTN, token_weights=None, **changes):
    """A recipe with token weights; round to nearest if nothing else is said."""
    return Recipe.load({"weights": weights, "token_weights": {"kind": kind} | (token_weights or {})} | changes)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("cgq", {"transforms": [{"kind": "smoothquant"}]}),
        ("cgq", {"transforms": [{"kind": "duquant"}]}),
        ("frontier", {"transforms": [{"kind": "quarot"}, {"kind": "smoothquant"}]}),
        ("cgq_text", {"transforms": [{"kind": "smoothquant"}]}),
        ("interaction", {"transforms": [{"kind": "smoothquant"}], "calibration": {"states": "clean"}}),
        ("interaction", ALLOCATED),
        ("interaction", {"transforms": [{"kind": "iaaq"}, {"kind": "hadamard"}]}),
        ("cgq", {"attention": {"value_granularity": "channel"}}),
        ("cgq", {"attention": {"search": True, "probs_range": "row"}}),
        ("cgq", {"attention": {"search": True, "probs_bits": None}}),
        ("cgq", {"transforms": [{"kind": "smoothquant"}], "token_weights": {"masked_base": 0}}),
    ],
    ids=str,
)
def test_token_weights_that_nothing_reads_are_an_error(kind, changes):
    with pytest.raises(
        RecipeError, match=rf"token_weights\.kind: '{kind}', but nothing .*valid: 'uniform', or with one"
    ):
        weighted(kind, **changes)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("cgq", {"weights": {"solver": "gptq"}}),
        ("cgq", {"weights": RTN | {"clip": "awq"}}),
        ("interaction", {"transforms": [{"kind": "awq"}]}),
        ("frontier", {"transforms": [{"kind": "wush"}]}),
        ("cgq", ALLOCATED),
        ("cgq", {"transforms": [{"kind": "iaaq"}, {"kind": "hadamard"}]}),
        ("interaction", {"transforms": [{"kind": "iaaq", "interaction": False}, {"kind": "hadamard"}]}),
        ("cgq", {"attention": {"search": True}}),
        ("cgq", {"attention": {"search": True, "probs_range": "row", "probs_grid": "search"}}),
        ("cgq", {"attention": {"search": True, "probs_bits": None, "value_granularity": "head"}}),
        ("cgq", {"transforms": [{"kind": "smoothquant"}], "token_weights": {"unmasked_base": 0}}),
        ("frontier", {"transforms": [{"kind": "duquant"}], "token_weights": {"context": 0}}),
    ],
    ids=str,
)
def test_token_weights_that_something_reads_are_valid(kind, changes):
    assert f"{kind} token weights" in weighted(kind, **changes).summary()


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
