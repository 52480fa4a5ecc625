"""Block-causal models, their alignment and their sampler together, against the published loops."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

import dllmquant
from dllmquant.cli.app import app
from dllmquant.decoding import Generation
from dllmquant.generation import decode_completions, generate_tokens
from dllmquant.lab.agreement import measure_agreement, record_agreement
from tests.oracles import block_diffusion_decoding as oracle
from tests.tiny import tiny_fast_dllm, tiny_llada2, tiny_sdar, tiny_sdar_moe, tiny_tokenizer

PROMPTS = [" tom is in", "q: anna has 3 apples. anna buys 4 more. how many remain? a:", " so"]
SHARP: dict[str, Any] = {"initializer_range": 0.4, "rope_theta": 1000.0}


def first_end(tokens: list[int], ends: tuple[int, ...]) -> int:
    return next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("remasking", ["low_confidence_dynamic", "low_confidence_static", "sequential"])
@pytest.mark.parametrize("tiny", [tiny_sdar, tiny_sdar_moe, tiny_llada2])
def test_tokens_equal_sdars_and_llada2s_loops(tiny: Any, remasking: str, batch_size: int) -> None:
    model, tokenizer = tiny(**SHARP).double(), tiny_tokenizer()
    settings: dict[str, Any] = {"remasking": remasking, "threshold": 0.4, "steps": 4, "gen_length": 13}
    found = generate_tokens(model, tokenizer, PROMPTS, batch_size=batch_size, **settings)
    assert_oracle(model, found, lambda logits, ids: oracle.sdar(logits, ids, block_length=4, **common(), **settings))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_tokens_equal_fast_dllms_loop(batch_size: int) -> None:
    model, tokenizer = tiny_fast_dllm(**SHARP).double(), tiny_tokenizer()
    settings: dict[str, Any] = {"threshold": 0.4, "gen_length": 13, "sub_block_length": 2}
    found = generate_tokens(model, tokenizer, PROMPTS, batch_size=batch_size, **settings)
    assert_oracle(
        model, found, lambda logits, ids: oracle.fast_dllm(logits, ids, block_length=4, **common(), **settings)
    )


def common() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    return {"mask_id": tokenizer.mask_token_id, "stops": (tokenizer.eos_token_id,)}


def assert_oracle(model: PreTrainedModel, found: Generation, decode: Any) -> None:
    tokenizer = tiny_tokenizer()

    def logits(ids: list[int]) -> list[list[float]]:
        with torch.no_grad():
            rows: list[list[float]] = model(input_ids=torch.tensor([ids])).logits[0].tolist()
        return rows

    assert found.lengths is not None
    for row, prompt in enumerate(PROMPTS):
        expected = decode(logits, tokenizer(prompt).input_ids).tokens
        end = first_end(expected, (tokenizer.eos_token_id,))
        assert int(found.lengths[row]) == end
        assert found.tokens[row, :end].tolist() == expected[:end]


@pytest.mark.parametrize("options", [{}, {"steps": 2}, {"remasking": "sequential", "steps": 3}], ids=str)
@pytest.mark.parametrize("tiny", [tiny_sdar, tiny_fast_dllm])
def test_agreement_decides_as_the_sampler_did(tiny: Any, options: dict[str, Any]) -> None:
    model, tokenizer = tiny(**SHARP), tiny_tokenizer()
    if tiny is tiny_fast_dllm and "remasking" in options:
        options = options | {"steps": 4}
    settings: dict[str, Any] = {"gen_length": 11, "threshold": 0.4} | options
    reference = record_agreement(model, tokenizer, PROMPTS, **settings)
    states = torch.cat(reference.expected)
    taken = reference.committed[..., -11:]
    assert torch.equal(states, taken[(taken >= 0).any(-1)])
    itself = measure_agreement(reference, model, tokenizer)
    assert (itself.frontier.flips, set(itself.first_divergence)) == (0, {-1})


def test_texts_end_where_the_sampler_ended_them() -> None:
    """At an end of turn, too, whatever was decoded behind it."""
    tokenizer = tiny_tokenizer()
    row = tokenizer(" tom is in the kitchen").input_ids
    tokens = torch.tensor([row, row])
    steps = torch.ones(2, dtype=torch.int64)
    texts = decode_completions(tokenizer, Generation(tokens, 1, steps, None, torch.tensor([2, len(row)])))
    assert texts == [tokenizer.decode(row[:2]), tokenizer.decode(row)]


def test_the_command_line_drives_the_sampler(tmp_path: Path) -> None:
    model, tokenizer = tiny_sdar(**SHARP), tiny_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    words = ["--remasking", "sequential", "--gen-length", "9", "--steps", "2"]
    result = CliRunner().invoke(app, ["generate", str(tmp_path), *PROMPTS, *words])
    assert result.exit_code == 0, result.output
    expected = dllmquant.generate(model, tokenizer, PROMPTS, remasking="sequential", gen_length=9, steps=2)
    assert result.stdout.splitlines() == [text.strip() for text in expected]
    result = CliRunner().invoke(app, ["generate", str(tmp_path), *PROMPTS, "--block-length", "8"])
    assert result.exit_code != 0
    assert "block_length is 8; valid: 4, by which the model attends" in result.output
