"""Dream's model, alignment and sampler together, against its published loop."""

from typing import Any

import pytest
import torch

import dllmquant
from dllmquant.generation import generate_tokens
from dllmquant.models import DreamModel
from tests.oracles import dream_decoding as oracle
from tests.tiny import tiny_dream, tiny_tokenizer

PROMPTS = [" tom is in", "q: anna has 3 apples. anna buys 4 more. how many remain? a:", " so"]
SETTINGS: dict[str, Any] = {"steps": 9, "gen_length": 12}


@pytest.fixture(scope="module")
def model() -> DreamModel:
    """A random float64 model whose attention is sharp, so that prompts matter."""
    return tiny_dream(initializer_range=0.5, rope_theta=1000.0, sampler_defaults=SETTINGS).double()


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("remasking", ["maskgit_plus", "topk_margin", "entropy"])
def test_tokens_equal_the_published_algorithm(model: DreamModel, prompt: str, remasking: str) -> None:
    tokenizer = tiny_tokenizer()

    def logits(ids: list[int]) -> list[list[float]]:
        with torch.no_grad():
            rows: list[list[float]] = model(input_ids=torch.tensor([ids])).logits[0].tolist()
        return [rows[0], *rows[:-1]]  # those at a position predict the next one

    assert tokenizer.mask_token_id is not None
    reference = oracle.decode(
        logits, tokenizer(prompt).input_ids, mask_id=tokenizer.mask_token_id, remasking=remasking, **SETTINGS
    )
    generation = generate_tokens(model, tokenizer, [prompt], remasking=remasking, record=True)
    assert generation.tokens.tolist() == [reference.tokens]
    assert generation.trajectory is not None
    for step, expected in enumerate(reference.steps):
        state = generation.trajectory.state(0, step)
        assert state.ids.tolist() == expected.ids
        assert state.committed.nonzero().squeeze(1).tolist() == expected.committed
        torch.testing.assert_close(state.confidence, torch.tensor(expected.confidence))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "top_p": 0.9, "seed": 3}, {"remasking": "origin"}, {"remasking_temperature": 0.5}],
    ids=str,
)
def test_batching_does_not_change_the_result(model: DreamModel, options: dict[str, Any], batch_size: int) -> None:
    tokenizer = tiny_tokenizer()
    expected = dllmquant.generate(model, tokenizer, PROMPTS, batch_size=3, **options)
    assert len(set(expected)) == len(PROMPTS)
    assert dllmquant.generate(model, tokenizer, PROMPTS, batch_size=batch_size, **options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 4}, "sampler setting 'block_length' is unknown; valid: steps, gen_length, temperature"),
        ({"remasking": "low_confidence"}, "remasking is 'low_confidence'; valid: 'origin', 'maskgit_plus'"),
        ({"steps": 0}, "steps is 0; valid"),
    ],
)
def test_bad_settings_are_errors(model: DreamModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dllmquant.generate(model, tiny_tokenizer(), PROMPTS, **options)
