"""Dream's model, alignment and sampler together, against its published loop."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

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


# the published method


def padded(prompts: list[str]) -> tuple[Tensor, Tensor]:
    tokenizer = tiny_tokenizer()
    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    width = max(map(len, rows))
    ids = [[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
    return torch.tensor(ids), torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def test_the_call_of_the_published_readme(model: DreamModel) -> None:
    ids, attention_mask = padded(PROMPTS[1:2])
    torch.manual_seed(3)
    output = model.diffusion_generate(
        ids,
        attention_mask=attention_mask,
        max_new_tokens=12,
        output_history=True,
        return_dict_in_generate=True,
        steps=9,
        temperature=0.2,
        top_p=0.95,
        alg="entropy",
        alg_temp=0.0,
    )
    settings: dict[str, Any] = {"temperature": 0.2, "top_p": 0.95, "remasking": "entropy"}
    # Our own function draws the prompts' seeds from a generator; the method from torch's.
    expected = generate_tokens(model, tiny_tokenizer(), PROMPTS[1:2], seed=3, **SETTINGS, **settings)
    assert torch.equal(output.sequences, torch.cat([ids, expected.tokens], dim=1))
    assert torch.equal(output.history[-1], output.sequences)
    assert output[0] is output.sequences


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
def test_the_method_equals_the_published_algorithm(model: DreamModel, alg: str) -> None:
    """Prompts of three lengths at once, and the states after every step."""
    tokenizer = tiny_tokenizer()
    mask_id = tokenizer.mask_token_id
    assert mask_id is not None
    ids, attention_mask = padded(PROMPTS)

    def logits(row: list[int]) -> list[list[float]]:
        with torch.no_grad():
            rows: list[list[float]] = model(input_ids=torch.tensor([row])).logits[0].tolist()
        return [rows[0], *rows[:-1]]

    options: dict[str, Any] = {"attention_mask": attention_mask, "max_new_tokens": 12, "steps": 9, "alg": alg}
    output = model.diffusion_generate(ids, return_dict_in_generate=True, output_history=True, **options)
    for row, prompt in enumerate(PROMPTS):
        reference = oracle.decode(
            logits, tokenizer(prompt).input_ids, mask_id=mask_id, remasking=alg, steps=9, gen_length=12
        )
        new = [frame[row, -12:].tolist() for frame in output.history]
        assert new == [*(step.ids[-12:] for step in reference.steps[1:]), reference.tokens]
        assert all(torch.equal(frame[row, :-12], ids[row]) for frame in output.history)
    assert torch.equal(model.diffusion_generate(ids, **options), output.sequences)
    assert model.diffusion_generate(ids, return_dict_in_generate=True, **options).history is None


def test_the_methods_defaults_are_the_published_ones(model: DreamModel) -> None:
    """Twenty tokens in random order, from torch's generator; the checkpoint's own settings do not count."""
    ids, attention_mask = padded(PROMPTS)
    torch.manual_seed(5)
    found = model.diffusion_generate(ids, attention_mask=attention_mask)
    expected = generate_tokens(
        model, tiny_tokenizer(), PROMPTS, seed=5, gen_length=20, steps=512, remasking="origin", batch_size=3
    )
    assert torch.equal(found[:, ids.shape[1] :], expected.tokens)
    options: dict[str, Any] = {"attention_mask": attention_mask, "alg": "entropy", "steps": 4}
    shorter = model.diffusion_generate(ids, max_length=ids.shape[1] + 6, **options)
    assert torch.equal(shorter, model.diffusion_generate(ids, max_new_tokens=6, max_length=3, **options))
    assert shorter.shape == (3, ids.shape[1] + 6)


def test_several_sequences_of_a_prompt(model: DreamModel) -> None:
    ids, attention_mask = padded(PROMPTS[:2])
    output = model.diffusion_generate(
        ids,
        attention_mask=attention_mask,
        max_new_tokens=8,
        num_return_sequences=2,
        alg="origin",
        return_dict_in_generate=True,
        output_history=True,
    )
    assert torch.equal(output.sequences[:, : ids.shape[1]], ids.repeat_interleave(2, dim=0))
    masks = torch.stack([(frame == tiny_tokenizer().mask_token_id).sum(dim=1) for frame in output.history])
    assert torch.equal(masks[-1], torch.zeros_like(masks[-1]))
    assert bool((masks[1:] <= masks[:-1]).all())
    assert not torch.equal(output.history[0][0], output.history[0][1])  # each its own random numbers


def test_padding_without_a_mask_is_reported(model: DreamModel, caplog: pytest.LogCaptureFixture) -> None:
    ids, attention_mask = padded(PROMPTS)
    options: dict[str, Any] = {"max_new_tokens": 4, "steps": 2, "alg": "entropy"}
    with caplog.at_level(logging.WARNING):
        model.diffusion_generate(ids, attention_mask=attention_mask, **options)
        assert not caplog.records
        model.diffusion_generate(ids, **options)
    assert "there is no attention_mask" in caplog.text


def test_quantized_models_have_the_method() -> None:
    quantized: Any = dllmquant.DLLMQuantizer("rtn-w8a8").quantize(tiny_dream(), progress=False)
    ids, attention_mask = padded(PROMPTS)
    found = quantized.diffusion_generate(ids, attention_mask=attention_mask, max_new_tokens=8, steps=6, alg="entropy")
    expected = generate_tokens(quantized, tiny_tokenizer(), PROMPTS)  # the tiny model's own settings
    assert torch.equal(found[:, ids.shape[1] :], expected.tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_tokens_hook_func": print}, "unsupported arguments generation_tokens_hook_func; valid: inputs, "),
        ({"block_length": 4, "do_sample": True}, "unsupported arguments block_length, do_sample; valid: .*, alg_temp"),
        ({"alg": "low_confidence"}, "^alg is 'low_confidence'; valid: 'origin', 'maskgit_plus'"),
        ({"alg_temp": 0.5}, "^alg_temp is 0.5 with alg 'origin'"),
        ({"max_new_tokens": 0}, "^max_new_tokens is 0; valid"),
        ({"max_length": 2}, "^max_length is 2; valid: more than the"),
        ({"num_return_sequences": 0}, "^num_return_sequences is 0; valid"),
        ({"attention_mask": torch.ones(1, 2)}, r"attention_mask has shape \(1, 2\); valid: \(3, "),
        ({"attention_mask": "right"}, "attention_mask is 0 behind a 1; valid: left padding"),
        ({"inputs": torch.ones(3)}, r"inputs has shape \(3,\) and dtype torch.float32; valid: token ids"),
    ],
)
def test_what_the_method_refuses(model: DreamModel, options: dict[str, Any], message: str) -> None:
    ids, attention_mask = padded(PROMPTS)
    if isinstance(options.get("attention_mask"), str):
        options = {"attention_mask": attention_mask.flip(1)}
    with pytest.raises(ValueError, match=message):
        model.diffusion_generate(**{"inputs": ids, "attention_mask": attention_mask} | options)


def test_hooks_that_are_none_are_accepted(model: DreamModel) -> None:
    ids, _ = padded(PROMPTS[:1])
    options: dict[str, Any] = {"max_new_tokens": 4, "steps": 2, "alg": "entropy"}
    plain = model.diffusion_generate(ids, **options)
    assert torch.equal(model.diffusion_generate(ids, generation_tokens_hook_func=None, **options), plain)
