"""What `make_plan` refuses before any work: widths, heads and Hadamard matrices that do not go together."""

import pytest

from dllmquant import Recipe, RecipeError
from dllmquant.models import adapter_for
from dllmquant.plan import make_plan
from tests.tiny import tiny_dream, tiny_llada, tiny_recipe

BY_HEAD = {"allocation": {"mean_bits": 5, "heads": True}}


def planned(model, **changes):
    """Plans a recipe with small groups."""
    recipe = Recipe.load(tiny_recipe(**({"weights": {"group_size": None}} | changes)))
    return make_plan(model, adapter_for(model), recipe)


@pytest.mark.parametrize("family", [tiny_llada, tiny_dream])
def test_rotated_queries_need_a_hadamard_matrix_as_wide_as_a_head(family):
    attention = {"query_key_bits": 4, "rotate_query_key": True}
    planned(family(), attention=attention)
    size = {"d_model": 24} if family is tiny_llada else {"hidden_size": 24}
    with pytest.raises(RecipeError, match=r"attention\.rotate_query_key: true, but the heads of .* have 6 channels"):
        planned(family(**size), attention=attention)
    planned(family(**size), attention=attention | {"rotate_query_key": False})


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ({"kind": "hadamard", "block_size": 6}, r"hadamard\.block_size 6: no Hadamard matrix .* the input channels of"),
        ({"kind": "wush", "block_size": 6}, r"wush\.block_size 6: no Hadamard matrix .*: 2, for example"),
        (
            {"kind": "hadamard", "sites": ["ff_out"]},
            r"hadamard: no Hadamard matrix .* divides the 33 input channels of",
        ),
    ],
    ids=str,
)
def test_transforms_without_a_hadamard_matrix(transform, message):
    model = tiny_llada(d_model=24, mlp_hidden_size=33 if transform.get("sites") else 48)
    with pytest.raises(RecipeError, match=message):
        planned(model, transforms=[transform])


def test_other_orders_are_fine():
    planned(tiny_llada(d_model=24, mlp_hidden_size=48), transforms=[{"kind": "hadamard", "block_size": 12}])
    planned(tiny_llada(d_model=24, mlp_hidden_size=48), transforms=[{"kind": "duquant", "block_size": 6}])


@pytest.mark.parametrize(
    ("transform", "channels"),
    [
        ({"kind": "hadamard"}, 32),
        ({"kind": "hadamard", "block_size": 16}, 16),
        ({"kind": "wush", "block_size": 16, "sites": ["attn_out"]}, 16),
        ({"kind": "duquant", "block_size": 8}, 32),
    ],
    ids=str,
)
def test_heads_that_a_transform_mixes_get_no_bits_of_their_own(transform, channels):
    message = (
        rf"allocation\.heads: true, but transform '{transform['kind']}' at .*\.blocks\.0\.attn_out mixes {channels} "
        "channels, and heads have 8"
    )
    with pytest.raises(RecipeError, match=message):
        planned(tiny_llada(), transforms=[transform], activations=BY_HEAD)
    planned(tiny_llada(), transforms=[transform], activations={"allocation": {"mean_bits": 5}})
    planned(tiny_llada(), transforms=[transform], activations=BY_HEAD, skip=["*.attn_out"])


@pytest.mark.parametrize(
    "transform",
    [
        {"kind": "hadamard", "block_size": 8},
        {"kind": "wush", "block_size": 4},
        {"kind": "duquant", "block_size": 8, "sites": ["q_proj", "ff_out"]},
    ],
    ids=str,
)
def test_transforms_inside_heads_or_elsewhere_leave_heads_apart(transform):
    assert planned(tiny_llada(), transforms=[{"kind": "quarot"}, transform], activations=BY_HEAD).input_transforms


def test_heads_with_bits_of_their_own_need_groups_that_divide_them():
    planned(tiny_llada(), activations=BY_HEAD)
    planned(tiny_llada(), activations=BY_HEAD | {"group_size": 4})
    with pytest.raises(
        RecipeError, match=r"heads: true, but activations\.group_size 16 does not divide the 8 channels"
    ):
        planned(tiny_llada(), activations=BY_HEAD | {"group_size": 16})
    planned(tiny_llada(), activations={"allocation": {"mean_bits": 5}, "group_size": 16})
