from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import dllmquant
from dllmquant.decoding import Generation
from dllmquant.generation import decode_completions, encode_prompts, generate_tokens
from dllmquant.models import LLaDAConfig, LLaDAModelLM
from tests.bundled import bundled_tokenizer
from tests.oracles import llada_decoding as oracle

PROMPTS = [
    " tom is in",
    "q: anna has 3 apples. anna buys 4 more. how many remain? a:",
    " so",
    "code: x = [1, 2, 3]; x.reverse(); print(x) prints:",
    "read: tom is in the kitchen. mia is in the garden. so tom is in",
    "q:",
    " the red box holds",
]
SETTINGS: dict[str, Any] = {"steps": 6, "gen_length": 12, "block_length": 4}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bundled_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LLaDAModelLM:
    """A random float64 model whose attention is sharp, so that prompts matter."""
    config = LLaDAConfig(
        d_model=16,
        n_layers=2,
        n_heads=2,
        mlp_hidden_size=32,
        vocab_size=len(tokenizer),
        rope_theta=1000.0,
        mask_token_id=tokenizer.mask_token_id,
        init_std=0.5,
        sampler_defaults=SETTINGS,
    )
    torch.manual_seed(0)
    return LLaDAModelLM(config).double().eval()


@pytest.fixture
def own_sampler(model: LLaDAModelLM) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Sets the checkpoint's sampler settings for one test."""

    def use(settings: dict[str, Any]) -> None:
        model.config.sampler_defaults = settings

    yield use
    model.config.sampler_defaults = SETTINGS


# What is generated


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
@pytest.mark.parametrize(
    "options",
    [{}, {"threshold": 0.3}, {"temperature": 0.7, "seed": 3}, {"remasking": "random"}, {"cfg_scale": 1.0}],
    ids=["greedy", "threshold", "sampled", "random", "guided"],
)
def test_batching_does_not_change_the_result(
    model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], batch_size: int
) -> None:
    if not options.get("temperature") and not options.get("remasking"):
        alone = [dllmquant.generate(model, tokenizer, [prompt], **options)[0] for prompt in PROMPTS]
    else:  # random streams belong to places in the list
        alone = dllmquant.generate(model, tokenizer, PROMPTS, batch_size=4, **options)
    assert len(set(alone)) > 3
    assert dllmquant.generate(model, tokenizer, PROMPTS, batch_size=batch_size, **options) == alone


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_tokens_equal_the_published_algorithm(
    model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    def logits(ids: list[int]) -> list[list[float]]:
        with torch.no_grad():
            rows: list[list[float]] = model(input_ids=torch.tensor([ids])).logits[0].tolist()
        return rows

    reference = oracle.decode(logits, tokenizer(prompt).input_ids, mask_id=tokenizer.mask_token_id, **SETTINGS)
    generation = generate_tokens(model, tokenizer, [prompt])
    assert generation.tokens.tolist() == [reference.tokens]
    assert generation.forward_passes == reference.model_calls == SETTINGS["steps"]


def test_results_keep_the_order_of_the_prompts(model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    forward = dllmquant.generate(model, tokenizer, PROMPTS, batch_size=2)
    assert dllmquant.generate(model, tokenizer, PROMPTS[::-1], batch_size=3) == forward[::-1]


def test_seeds_decide_sampled_results(model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    def run(seed: int) -> list[str]:
        return dllmquant.generate(model, tokenizer, PROMPTS, temperature=1.0, seed=seed)

    state = torch.get_rng_state()
    first = run(1)
    assert run(1) == first
    assert run(2) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_text_is_the_decoded_tokens(model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    generation = generate_tokens(model, tokenizer, PROMPTS, logits_eos_inf=True)
    assert tokenizer.mask_token_id not in generation.tokens
    assert dllmquant.generate(model, tokenizer, PROMPTS, logits_eos_inf=True) == [
        tokenizer.decode(row) for row in generation.tokens
    ]


def completions(tokenizer: PreTrainedTokenizerFast, rows: list[list[int]]) -> list[str]:
    steps = torch.ones(len(rows), dtype=torch.int64)
    return decode_completions(tokenizer, Generation(torch.tensor(rows), 1, steps, None))


def test_completions_end_at_the_first_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    eos = tokenizer.eos_token_id
    the, ring, dot = tokenizer(" the ring.").input_ids
    rows = [[the, ring, dot, the], [the, ring, eos, dot], [the, eos, ring, eos], [eos, the, ring, dot], [eos] * 4]
    assert completions(tokenizer, rows) == [" the ring. the", " the ring", " the", "", ""]


def test_generated_eos_cuts_the_text(model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    def always_eos_after_two(_module: Any, _args: Any, output: Any) -> Any:
        output.logits[:] = 0.0
        output.logits[:, :, tokenizer(" the").input_ids[0]] = 5.0
        output.logits[:, -10:, tokenizer.eos_token_id] = 9.0
        return output

    handle = model.register_forward_hook(always_eos_after_two)
    try:
        assert dllmquant.generate(model, tokenizer, PROMPTS) == [" the the"] * len(PROMPTS)
    finally:
        handle.remove()


# Settings


def test_settings_come_from_the_checkpoint_unless_overridden(
    model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, own_sampler: Callable[[dict[str, Any]], None]
) -> None:
    def shape(**options: Any) -> tuple[int, int]:
        generation = generate_tokens(model, tokenizer, [" so"], **options)
        return generation.forward_passes, generation.tokens.shape[1]

    assert shape() == (6, 12)
    assert shape(steps=3, gen_length=None) == (3, 12)
    assert shape(cfg_scale=0.5) == (12, 12)
    own_sampler({"steps": 2, "gen_length": 4, "block_length": 2})
    assert shape() == (2, 4)


def test_recording_keeps_the_trajectory(model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert generate_tokens(model, tokenizer, PROMPTS[:2]).trajectory is None
    generation = generate_tokens(model, tokenizer, PROMPTS[:2], record=True)
    trajectory = generation.trajectory
    assert trajectory is not None
    assert trajectory.prompt_lengths.tolist() == [len(tokenizer(prompt).input_ids) for prompt in PROMPTS[:2]]
    assert trajectory.ids.shape[:2] == (2, SETTINGS["steps"])
    assert bool((trajectory.ids[:, 0, -SETTINGS["gen_length"] :] == tokenizer.mask_token_id).all())


def test_prompts_are_tokenized_one_by_one_without_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_prompts(tokenizer, PROMPTS) == [tokenizer(prompt).input_ids for prompt in PROMPTS]
    assert encode_prompts(tokenizer, tuple(PROMPTS)) == encode_prompts(tokenizer, PROMPTS)


def test_the_pad_token_does_not_matter(model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = dllmquant.generate(model, tokenizer, PROMPTS)
    pad = tokenizer.pad_token
    try:
        tokenizer.pad_token = tokenizer.unk_token
        assert dllmquant.generate(model, tokenizer, PROMPTS) == expected
        tokenizer.pad_token = None
        assert dllmquant.generate(model, tokenizer, PROMPTS) == expected
    finally:
        tokenizer.pad_token = pad


# Errors


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts: empty"),
        ("tom is in", "prompts: 'tom is in' is one string; give a list of strings"),
        (["tom", ""], r"prompts\[1\]: '' is not a non-empty string"),
        (["tom", None], r"prompts\[1\]: None is not a non-empty string"),
        ([["tom"]], r"prompts\[0\]: \['tom'\] is not a non-empty string"),
        ([" so", " tom[MASK] in"], r"prompts\[1\] contains the mask token 1 at \[1\]"),
    ],
)
def test_bad_prompts_are_errors(
    model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, prompts: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dllmquant.generate(model, tokenizer, prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 4}, "sampler setting 'step' is unknown; valid: steps"),
        ({"steps": 5}, "steps is 5; valid: a multiple of the number of blocks"),
        ({"gen_length": 10}, "gen_length is 10; valid: a multiple of block_length 4"),
        ({"remasking": "entropy"}, "remasking is 'entropy'; valid: "),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_settings_are_errors(
    model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dllmquant.generate(model, tokenizer, PROMPTS, **options)


def test_a_tokenizer_without_eos_is_an_error(model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    eos = tokenizer.eos_token
    try:
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="tokenizer: it has no EOS token"):
            dllmquant.generate(model, tokenizer, PROMPTS)
    finally:
        tokenizer.eos_token = eos


def test_other_models_are_errors(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"Linear.* is not a known diffusion LLM"):
        dllmquant.generate(cast("PreTrainedModel", torch.nn.Linear(2, 2)), tokenizer, PROMPTS)


# What generation leaves alone


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_model_runs_in_evaluation_mode_and_gets_its_mode_back(
    model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, training: bool, fails: bool
) -> None:
    seen: list[tuple[bool, bool]] = []

    def hook(module: PreTrainedModel, _args: Any, output: Any) -> None:
        seen.append((module.training, output.logits.requires_grad))
        if fails:
            raise RuntimeError("interrupted")

    handle = model.register_forward_hook(hook)
    model.train(training)
    try:
        if fails:
            with pytest.raises(RuntimeError, match="interrupted"):
                dllmquant.generate(model, tokenizer, PROMPTS)
        else:
            dllmquant.generate(model, tokenizer, PROMPTS)
        assert model.training == training
        assert all(module.training == training for module in model.modules())
    finally:
        handle.remove()
        model.eval()
    assert set(seen) == {(False, False)}


def test_weights_and_prompts_are_left_alone(model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    before: dict[str, Tensor] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prompts = list(PROMPTS)
    dllmquant.generate(model, tokenizer, prompts, temperature=1.0)
    assert prompts == PROMPTS
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("known", [True, False])
def test_the_end_of_turn_token_reaches_the_sampler(
    known: bool, model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaDA's chat models end turns with <|eot_id|>; a tokenizer without it has nothing to defer but EOS."""
    seen: list[int | None] = []

    def sample(*args: Any, eot_token_id: int | None, **kwargs: Any) -> Generation:
        seen.append(eot_token_id)
        return Generation(torch.zeros(1, 12, dtype=torch.int64), 0, torch.zeros(1, dtype=torch.int64), None)

    monkeypatch.setattr("dllmquant.generation.sample", sample)
    vocabulary = tokenizer.get_vocab() | ({"<|eot_id|>": 5} if known else {})
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: vocabulary)
    generate_tokens(model, tokenizer, PROMPTS[:1], **SETTINGS)
    assert seen == [5 if known else None]
