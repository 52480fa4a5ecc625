"""What `inspect` tells is held against the weight file, the configuration and counts made by hand."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from dllmquant import DLLMQuantizer
from dllmquant.checkpoint import weight_bytes
from dllmquant.lab.inspection import (
    ActivationBits,
    bits_text,
    checkpoint_bits,
    checkpoint_coverage,
    describe_checkpoint,
    mean_bits,
)
from dllmquant.preparation import SiteBits
from tests.tiny import save_tiny, tiny_llada, tiny_recipe, tiny_tokenizer

BLOCKS = "model.transformer.blocks"
SITES = ("q_proj", "attn_out", "ff_proj", "ff_out")
RICH = tiny_recipe(
    name="rich",
    weights={"group_size": 16, "mixed": {"choices": [1, 2, 3], "mean": 2.0}},
    activations={"bits": 4, "allocation": {"mean_bits": 5.0, "heads": True}},
    transforms=[
        {"kind": "wush", "block_size": 8, "sites": ["ff_out"]},
        {"kind": "duquant", "block_size": 16, "steps": 4, "sites": ["q_proj"]},
        {"kind": "hadamard", "block_size": 8, "sites": ["attn_out"]},
    ],
    attention={
        "value_bits": 8,
        "value_granularity": "channel",
        "query_key_bits": 8,
        "rotate_query_key": True,
    },
    calibration={"num_states": 12, "num_prompts": 4, "quotas": [0.5, 0.5], "mask_ratio_buckets": 2},
    skip=[f"{BLOCKS}.1.up_proj"],
)


def saved(directory: Path, recipe: dict[str, Any]) -> Path:
    model = DLLMQuantizer(recipe).quantize(tiny_llada(init_std=0.5), tokenizer=tiny_tokenizer(), progress=False)
    model.save_pretrained(directory)
    return directory


def described(directory: Path) -> str:
    return describe_checkpoint(directory, AutoConfig.from_pretrained(directory))


def section(text: str, start: str) -> list[list[str]]:
    """The cells of the table whose header starts with a word, without header and rule."""
    (table,) = [part for part in text.split("\n\n") if re.search(f"^{re.escape(start)} ", part, re.MULTILINE)]
    lines = table.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith(start)) + 2
    return [re.split(r"\s{2,}", line.strip()) for line in lines[first:]]


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("inspection") / "rich", RICH)


@pytest.fixture(scope="module")
def text(rich: Path) -> str:
    return described(rich)


@pytest.fixture(scope="module")
def tensors(rich: Path) -> dict[str, torch.Tensor]:
    return load_file(rich / "model.safetensors")


@pytest.fixture(scope="module")
def stored(rich: Path) -> dict[str, Any]:
    return json.loads((rich / "config.json").read_text())["quantization_config"]


def test_facts(text: str, stored: dict[str, Any]) -> None:
    for fact in (
        "family:          llada",
        "quantized:       yes, layout version 1",
        "recipe:          rich (W2A4",
        "protocol:        linear+av+qk\n",
        f"states hash:     {stored['states_hash']}",
        "states took:     {prompts:,} prompts, {forward_passes:,} forward passes, {sequences:,} sequences, "
        "{tokens:,} tokens\n".format(**stored["cost"]),
        "attention:       in all 2 blocks: softmax 4-bit uniform (range: fixed), values 8-bit per channel (static), "
        "queries and keys 8-bit per token and head, rotated",
    ):
        assert fact in text


def test_bytes_are_those_in_the_file(text: str, tensors: dict[str, torch.Tensor], rich: Path) -> None:
    """Every tensor of the file is counted in one row: of its kind of layer, of the attention, or of everything else."""
    told = {
        row[0] if len(row) < 5 or row[1] != "not quantized" else f"{row[0]} kept": row for row in section(text, "layer")
    }
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    counted = 0
    for kind, count, parameters in [
        ("q_proj", 2, 2 * 32 * 32),
        ("k_proj", 2, 2 * 32 * 32),
        ("v_proj", 2, 2 * 32 * 32),
        ("attn_out", 2, 2 * 32 * 32),
        ("ff_proj", 2, 2 * 32 * 64),
        ("up_proj", 1, 32 * 64),
        ("up_proj kept", 1, 32 * 64),
        ("ff_out", 2, 2 * 32 * 64),
    ]:
        blocks = {"up_proj": [0], "up_proj kept": [1]}.get(kind, [0, 1])
        mine = [f"{BLOCKS}.{block}.{kind.split()[0]}." for block in blocks]
        taken = sum(size for name, size in sizes.items() if name.startswith(tuple(mine)))
        transforms = sum(size for name, size in sizes.items() if name.startswith(tuple(f"{m}input_" for m in mine)))
        numbers = [str(count), f"{parameters:,}", f"{taken:,}", f"{transforms:,}", f"{taken / parameters:.3f}"]
        assert told[kind][-5:] == numbers
        counted += taken
    assert told["all"][1:4] == ["14", "20,480", f"{counted:,}"]
    assert told["all"][5] == f"{counted / 20480:.3f}"
    attention = sum(size for name, size in sizes.items() if ".attention_quantizer." in name)
    assert attention == 2 * 4 * (4 + 2 * 4 * 8)  # the ends of 4 heads' grids; 4 heads × 8 channels of scales, zeros
    assert told["attention scales"][1] == f"{attention:,}"
    assert told["everything else"][1] == f"{sum(sizes.values()) - counted - attention:,}"
    files = {row[0]: row[1] for row in section(text, "file")}
    assert files["model.safetensors"] == f"{(rich / 'model.safetensors').stat().st_size:,}"


def test_input_transforms(text: str) -> None:
    """DuQuant: two block rotations of 32/16 float32 matrices and an int32 permutation; Hadamards store nothing."""
    told = {row[0]: row for row in section(text, "layer")}
    duquant = 2 * (2 * 4 * 2 * 16 * 16 + 4 * 32)
    for kind in ("q_proj", "k_proj", "v_proj"):
        assert told[kind][3] == "block 16 · permute · block 16"
        assert told[kind][-2] == f"{duquant:,}"
    assert told["ff_out"][3] == "block 8"
    assert told["ff_out"][-2] == f"{2 * 4 * 8 * 8 * 8:,}"
    assert (told["attn_out"][3], told["attn_out"][-2]) == ("hadamard 8", "0")
    assert (told["ff_proj"][3], told["ff_proj"][-2]) == ("none", "0")
    assert told["all"][-2] == f"{3 * duquant + 2 * 4 * 8 * 8 * 8:,}"


@pytest.mark.parametrize("kind", ["q_proj", "attn_out", "ff_proj", "ff_out"])
def test_mixed_widths_are_those_of_the_groups(text: str, stored: dict[str, Any], kind: str) -> None:
    groups = [
        width for block in (0, 1) for width in stored["modules"][f"{BLOCKS}.{block}.{kind}"]["weight"]["group_bits"]
    ]
    widths = sorted(set(groups))
    mean = f", mean {round(sum(groups) / len(groups), 2)}," if len(widths) > 1 else ""
    told = next(row for row in section(text, "layer") if row[0] == kind)
    assert told[1] == f"{'/'.join(map(str, widths))}-bit{mean} asymmetric per group of 16"


def test_some_layer_is_mixed(text: str) -> None:
    assert "-bit, mean " in text


def test_activation_bits_by_block_and_input(text: str, stored: dict[str, Any], rich: Path) -> None:
    """From the schemes the layers run with; a head of 8 channels is a group of them."""
    total = channels = 0
    for block, row in enumerate(section(text, "block")):
        assert row[0] == str(block)
        for site, cell in zip(SITES, row[1:], strict=True):
            scheme = stored["modules"][f"{BLOCKS}.{block}.{site}"]["activation"]
            bits = scheme.get("group_bits") or [scheme["bits"]]
            assert cell == "/".join(map(str, bits))
            assert (len(bits), scheme["group_size"]) == ((4, 8) if site == "attn_out" else (1, None))
            width = 64 if site == "ff_out" else 32
            total += width * sum(bits) / len(bits)
            channels += width
    assert total / channels <= 5
    assert f"activation bits by block and input, mean {round(total / channels, 3)}; several numbers: head by" in text
    assert re.search(r"^block  q_proj\+k_proj\+v_proj  attn_out  ff_proj\+up_proj  ff_out$", text, re.MULTILINE)
    bits = checkpoint_bits(AutoConfig.from_pretrained(rich))
    assert bits is not None
    assert bits.mean == pytest.approx(total / channels)
    inputs = next(row[2] for row in section(text, "layer") if row[0] == "attn_out")
    heads = [b for block in (0, 1) for b in stored["modules"][f"{BLOCKS}.{block}.attn_out"]["activation"]["group_bits"]]
    assert inputs == f"4/8-bit, mean {round(sum(heads) / 8, 2)}, symmetric per group of 8" or len(set(heads)) == 1


def test_coverage(text: str, stored: dict[str, Any], rich: Path) -> None:
    coverage = stored["coverage"]
    rows = section(text, "segment")[:2]
    for segment, (row, name) in enumerate(zip(rows, ["1 (0-50%)", "2 (50-100%)"], strict=True)):
        assert row[0] == name
        for bucket, cell in enumerate(row[1:]):
            states, recorded, masked, other = (
                coverage[table][segment][bucket] for table in ("states", "recorded", "masked_tokens", "unmasked_tokens")
            )
            if states:
                assert cell == f"{states}/{recorded} ({masked}+{other})"
            else:
                assert cell == (f"0/{recorded}" if recorded else "." if segment == bucket else "0")
    assert "calibration states: 12 states, " in text
    assert "50-100% masked" in text
    assert "note:" not in text
    found = checkpoint_coverage(AutoConfig.from_pretrained(rich))
    assert found is not None
    assert found.to_dict() == coverage


def changed(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a checkpoint with another quantization configuration."""
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_notes_say_what_is_not_covered(rich: Path, tmp_path: Path) -> None:
    def empty(q: dict[str, Any]) -> None:
        q["coverage"] |= {"states": [[0, 0], [6, 0]], "recorded": [[0, 9], [9, 0]]}

    text = described(changed(rich, tmp_path, empty))
    assert "note: recorded, but not selected, is segment 1 of 2 with 50 to 100% masked (9 states)" in text
    assert section(text, "segment")[0] == ["1 (0-50%)", ".", "0/9"]

    def on_purpose(q: dict[str, Any]) -> None:
        empty(q)
        q["recipe"]["calibration"]["quotas"] = [0.0, 1.0]

    assert "note:" not in described(changed(rich, tmp_path, on_purpose))

    def drawn(q: dict[str, Any]) -> None:
        q["coverage"] |= {"states": [[0, 0], [6, 0]], "recorded": None}
        q["recipe"]["calibration"] |= {"states": "mcs", "quotas": [0.0, 1.0]}

    text = described(changed(rich, tmp_path, drawn))
    assert "note: no state drawn lies in segment 1 of 2 with 50 to 100% masked" in text
    assert section(text, "segment")[0] == ["1 (0-50%)", ".", "0"]
    assert "cells: states (masked+other tokens)" in text


def test_attention_that_differs_between_blocks(rich: Path, tmp_path: Path) -> None:
    def change(q: dict[str, Any]) -> None:
        q["attention"][f"{BLOCKS}.1"]["scheme"] |= {
            "probs_grid": "log2",
            "probs_range": "row",
            "query_key_bits": None,
            "rotate_query_key": False,
        }

    text = described(changed(rich, tmp_path, change))
    assert "\nattention:" not in text
    values = "8-bit per channel (static)"
    assert section(text, "attention of") == [
        [f"{BLOCKS}.0", "4-bit uniform (range: fixed)", values, "8-bit per token and head, rotated"],
        [f"{BLOCKS}.1", "4-bit log2 (range: row)", values, "not quantized"],
    ]

    def part(q: dict[str, Any]) -> None:
        del q["attention"][f"{BLOCKS}.1"]

    assert "attention:       in 1 of 2 blocks: softmax" in described(changed(rich, tmp_path, part))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything about the attention was searched."""
    attention = {"probs_grid": "search", "probs_range": "search", "value_granularity": "head", "search": True}
    return saved(tmp_path_factory.mktemp("inspection") / "searched", tiny_recipe(attention=attention))


def test_errors_of_the_attention_are_those_that_were_found(searched: Path) -> None:
    config = json.loads((searched / "config.json").read_text())["quantization_config"]
    reports, text = config["attention_reports"], described(searched)
    kinds = [f"{grid} {kind}" for kind in ("fixed", "row") for grid in ("uniform", "log2", "log_sqrt2")]
    title = r"\s{2,}".join(["error in block", *kinds, "0 to 1", "values", "full range"])
    assert re.search(f"^{title}$", text, re.MULTILINE)
    rows = section(text, "error in block")
    assert len(rows) == len(reports) == 2
    for block, (row, report) in enumerate(zip(rows, reports, strict=True)):
        assert report["block"] == f"{BLOCKS}.{block}"
        scheme = config["attention"][report["block"]]["scheme"]
        assert report["chosen"] == f"{scheme['probs_grid']} {scheme['probs_range']}"
        cells = [f"{'*' if kind == report['chosen'] else ''}{report['softmax'][kind]:.3g}" for kind in kinds]
        rest = [f"{report[name]:.3g}" for name in ("softmax_full_range", "values", "values_full_range")]
        assert row == [str(block), *cells, *rest]
        assert min(report["softmax"], key=report["softmax"].get) == report["chosen"]


def test_errors_of_values_alone(text: str, stored: dict[str, Any]) -> None:
    """The rich recipe's values are static, but nothing is searched."""
    for row, report in zip(section(text, "error in block"), stored["attention_reports"], strict=True):
        assert row[1:] == [f"{report['values']:.3g}"] * 2
    assert "relative error of the attention output: static values (full range: α = 1)\n" in text


def test_checkpoints_of_before_there_were_reports(searched: Path, tmp_path: Path) -> None:
    changed(searched, tmp_path, lambda q: q.pop("attention_reports"))
    assert "error in block" not in described(tmp_path)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(*(AutoModel.from_pretrained(path)(ids).logits for path in (searched, tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": "x"}, "the model has no block 'x'"),
        ({"chosen": "x"}, "chosen: 'x'; valid: "),
        ({"chosen": None}, "chosen: None; valid: "),
        ({"values": "x"}, "Unknown format code|Invalid format"),
        ({"extra": 1}, "unexpected keyword argument 'extra'"),
        ({"softmax": None}, ""),
    ],
)
def test_malformed_reports(searched: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    changed(searched, tmp_path, lambda q: q["attention_reports"][0].update(change))
    with pytest.raises(ValueError, match=f"attention_reports is malformed: .*(?:{message})"):
        described(tmp_path)


def test_a_recipe_without_extras(tmp_path: Path) -> None:
    recipe = {"weights": {"solver": "rtn", "symmetric": True, "group_size": None}, "calibration": None}
    text = described(saved(tmp_path, recipe))
    assert "protocol:        weights" in text
    assert "states hash:     none; the recipe uses no data" in text
    for absent in ("attention", "transform", "activation bits", "segment", "note"):
        assert absent not in text
    told = {row[0]: row for row in section(text, "layer")}
    taken = 2 * 32 * (32 // 2 + 2)
    numbers = ["2", "2,048", f"{taken:,}", f"{taken / 2048:.3f}"]
    assert told["q_proj"] == ["q_proj", "4-bit symmetric per channel", "not quantized", *numbers]
    config = AutoConfig.from_pretrained(tmp_path)
    assert (checkpoint_bits(config), checkpoint_coverage(config)) == (None, None)


def test_a_model_that_is_not_quantized_has_no_maps(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(save_tiny(tmp_path))
    assert (checkpoint_bits(config), checkpoint_coverage(config)) == (None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q["modules"].update({"x": q["modules"][f"{BLOCKS}.0.q_proj"]}), "no quantizable layer 'x'"),
        (
            lambda q: q["attention"].update({"x": q["attention"][f"{BLOCKS}.0"]}),
            "attention: the model has no block 'x'",
        ),
        (
            lambda q: q["modules"][f"{BLOCKS}.0.q_proj"]["weight"].update(group_bits=[2, 2, 2]),
            r"modules\['model.transformer.blocks.0.q_proj'\]: group_bits: 3 widths; valid: 2",
        ),
        (lambda q: q["allocation"][0].update(site="x"), "allocation is malformed: the model has no site 'x'"),
        (lambda q: q["allocation"][0].update(bits="4"), "allocation is malformed"),
        (lambda q: q["allocation"][0].pop("bits"), "allocation is malformed"),
        (lambda q: q["coverage"].pop("states"), "coverage is malformed: coverage: keys"),
        (lambda q: q.update(coverage=[1]), "coverage is malformed"),
        (lambda q: q["cost"].pop("tokens"), "quantization_config.cost is malformed: cost: "),
    ],
)
def test_malformed_configurations(
    rich: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        described(changed(rich, tmp_path, change))


@pytest.mark.parametrize(
    "name",
    [
        "0.q_proj.weight_scale",
        "1.ff_out.input_transform.step_0",
        "0.attention_quantizer.value_zero",
        "1.up_proj.weight",
    ],
)
def test_tensors_that_are_missing(rich: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], name: str) -> None:
    changed(rich, tmp_path, lambda _: None)
    rest = {key: tensor for key, tensor in tensors.items() if key != f"{BLOCKS}.{name}"}
    save_file(rest, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"the weight files hold no {BLOCKS}.{name}$"):
        described(tmp_path)


def test_weight_bytes_counts_what_is_stored(rich: Path, tensors: dict[str, torch.Tensor]) -> None:
    counted = weight_bytes(AutoModel.from_pretrained(rich))
    assert counted.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    packed = [f"{BLOCKS}.{b}.{k}." for b in (0, 1) for k in ("q_proj", "k_proj", "v_proj", *SITES[1:])]
    packed.append(f"{BLOCKS}.0.up_proj.")
    expected = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(tuple(packed)))
    assert counted.quantized_bytes == expected
    assert counted.attention_bytes == 2 * 4 * (4 + 2 * 4 * 8)
    assert counted.quantized_parameters == 20480 - 32 * 64


def test_mean_bits_weighs_by_channels() -> None:
    entries = [SiteBits("a", None, 8, {}), *(SiteBits("b", head, bits, {}) for head, bits in enumerate((4, 4, 4, 8)))]
    assert mean_bits(entries, {"a": 32, "b": 96}) == pytest.approx((8 * 32 + 5 * 96) / 128)


def test_bits_of_heads() -> None:
    assert bits_text((4,)) == "4"
    assert bits_text((4, 8, 4, 4)) == "4/8/4/4"
    assert bits_text(()) == "-"
    assert bits_text((4,) * 30 + (8,) * 2) == "30×4 2×8"


def test_sites_that_are_not_quantized(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        activations={"bits": 4, "allocation": {"mean_bits": 8.0}}, skip=[f"{BLOCKS}.0.q_proj", f"{BLOCKS}.1.ff_out"]
    )
    path = saved(tmp_path, recipe)
    bits = checkpoint_bits(AutoConfig.from_pretrained(path))
    assert bits == ActivationBits(
        ("q_proj+k_proj+v_proj", "attn_out", "ff_proj+up_proj", "ff_out"),
        (((8,),) * 4, (*((8,),) * 3, ())),
        8.0,
    )
    assert math.isclose(bits.mean, 8.0)
    assert section(described(path), "block")[1][-1] == "-"
