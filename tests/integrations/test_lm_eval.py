import importlib
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dllmquant[eval]'")

import evaluate as hf_evaluate
import lm_eval.__main__
import lm_eval.evaluator
import lm_eval.tasks
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import dllmquant
from dllmquant.decoding import BlockDiffusionSamplerConfig, DreamSamplerConfig, Generation, SamplerConfig
from dllmquant.generation import decode_completions, generate_from_ids, generate_tokens
from dllmquant.integrations.lm_eval import DLLMQuantLM
from dllmquant.integrations.lm_eval import model as module
from dllmquant.integrations.lm_eval.loading import usable_device
from dllmquant.integrations.lm_eval.requests import GenerationOptions, cut_at_stops, read_options
from dllmquant.lab.evaluate import evaluate
from dllmquant.models import LLaDAModelLM
from dllmquant.presets import PRESETS, find_preset
from dllmquant.tasks import take
from tests.oracles import llada_decoding as oracle
from tests.tiny import save_tiny, tiny_dream, tiny_llada, tiny_tokenizer

CONTEXTS = [
    "q: tom has 7 apples. tom buys 5 more. how many remain? a:",
    "q:",
    "read: tom is in the kitchen. so tom is in",
    "code: x = [3, 1, 4]; print(x) prints:",
    "q: mia has 4 eggs. how many? a:",
]


@pytest.fixture(scope="module", autouse=True)
def _no_survey_of_the_machine() -> Iterator[None]:
    """What lm-eval writes about the machine takes it seconds to find out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def tiny() -> LLaDAModelLM:
    """A random float64 model whose attention is sharp, so that prompts matter and rounding does not."""
    return tiny_llada(init_std=0.5).double()


def adapted(tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, **options: Any) -> DLLMQuantLM:
    return DLLMQuantLM(tiny, tokenizer, **options)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


def generated(lm: DLLMQuantLM, contexts: list[str], **gen_kwargs: Any) -> list[str]:
    requests = instances("generate_until", [(context, gen_kwargs) for context in contexts])
    return lm.generate_until(requests, disable_tqdm=True)


def scored(lm: DLLMQuantLM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(instances("loglikelihood", list(pairs)), disable_tqdm=True)


# what a request means


TINY = SamplerConfig(steps=16, gen_length=32, block_length=8)
DREAM = DreamSamplerConfig(steps=256, gen_length=512)


@pytest.mark.parametrize(
    ("gen_kwargs", "chosen", "stops", "max_tokens", "settings"),
    [
        ({}, {}, (), None, {}),
        ({"until": "x"}, {}, ("x",), None, {}),
        ({"until": ["a", "", "b"]}, {}, ("a", "b"), None, {}),
        ({"until": None}, {}, (), None, {}),
        ({"max_gen_toks": 20}, {}, (), 20, {"gen_length": 24, "steps": 12}),
        ({"max_gen_toks": 24}, {}, (), 24, {"gen_length": 24, "steps": 12}),
        ({"max_gen_toks": None, "max_new_tokens": 3}, {}, (), 3, {"gen_length": 8, "steps": 4}),
        ({"max_gen_toks": 9, "max_tokens": 90}, {}, (), 9, {"gen_length": 16, "steps": 8}),
        ({"max_gen_toks": 20}, {"block_length": 4}, (), 20, {"block_length": 4, "gen_length": 20, "steps": 10}),
        ({"max_gen_toks": 3}, {"block_length": 3}, (), 3, {"block_length": 3, "gen_length": 3, "steps": 2}),
        ({"max_gen_toks": 20}, {"steps": 6}, (), 20, {"gen_length": 24, "steps": 6}),
        ({"max_gen_toks": 20}, {"gen_length": 64}, (), None, {"gen_length": 64}),
        ({"max_gen_toks": 20, "gen_length": 16, "steps": 2}, {}, (), None, {"gen_length": 16, "steps": 2}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.95}, {}, (), None, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.7}, {}, (), None, {"temperature": 0.7}),
        ({"do_sample": True, "temperature": 1}, {"temperature": 0.1}, (), None, {"temperature": 0.1}),
        ({"temperature": 1, "top_p": 1.0, "top_k": 0, "num_beams": 1}, {}, (), None, {"temperature": 1.0}),
        ({"do_sample": True}, {}, (), None, {}),
    ],
)  # fmt: skip
def test_what_a_request_means(
    gen_kwargs: dict[str, Any],
    chosen: dict[str, Any],
    stops: tuple[str, ...],
    max_tokens: int | None,
    settings: dict[str, Any],
) -> None:
    before = json.dumps([gen_kwargs, chosen])
    found = read_options(gen_kwargs, chosen, TINY, TINY.__dataclass_fields__)
    assert found == GenerationOptions(stops, max_tokens, tuple(sorted(settings.items())))
    SamplerConfig(**({name: getattr(TINY, name) for name in TINY.__dataclass_fields__} | settings))
    assert json.dumps([gen_kwargs, chosen]) == before


def test_what_a_request_means_to_dream() -> None:
    gen_kwargs = {"max_gen_toks": 30, "temperature": 0.1, "top_p": 0.9, "top_k": 0}
    found = read_options(gen_kwargs, {}, DREAM, DREAM.__dataclass_fields__)
    assert dict(found.settings) == {"gen_length": 30, "steps": 15, "temperature": 0.1, "top_p": 0.9}
    assert found.max_tokens == 30


def test_what_a_request_means_to_block_diffusion() -> None:
    """Any length will do, and steps are those of a block."""
    default = BlockDiffusionSamplerConfig(steps=2, gen_length=512)
    gen_kwargs = {"max_gen_toks": 30, "do_sample": False, "top_k": 0}
    found = read_options(gen_kwargs, {}, default, default.__dataclass_fields__)
    assert dict(found.settings) == {"gen_length": 30, "temperature": 0.0}
    assert found.max_tokens == 30


@pytest.mark.parametrize(
    ("gen_kwargs", "message"),
    [
        ({"stop": ["x"]}, "gen_kwargs: unknown 'stop'; valid: .*steps.*until"),
        ({"do_sample": True, "temperature": 0.2, "top_p": 0.95}, "top_p is 0.95, .* does not do; valid: 1"),
        ({"num_beams": 4}, "num_beams is 4, .* as in --gen_kwargs num_beams=1"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0; valid: an integer of at least 1"),
        ({"max_new_tokens": "8"}, "max_new_tokens is '8'; valid"),
        ({"until": ["a", 3]}, "until contains 3; valid: strings"),
    ],
)  # fmt: skip
def test_requests_the_sampler_cannot_serve(gen_kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options(gen_kwargs, {}, TINY, TINY.__dataclass_fields__)


def test_what_a_run_overrules_is_reported_once(
    tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    lm = adapted(tiny, tokenizer, gen_length=4, steps=2, temperature=0.0)
    generated(lm, CONTEXTS, max_gen_toks=9, do_sample=False)
    assert caplog.messages == ["a task asks for gen_length 9; the run's 4 counts"]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("a b c", (), ("a b c", False)),
        ("a b c", ("x",), ("a b c", False)),
        ("a b c b", ("c", " b"), ("a", True)),
        ("a b c", ("a",), ("", True)),
    ],
)
def test_texts_are_cut_at_the_first_stop(text: str, stops: tuple[str, ...], expected: tuple[str, bool]) -> None:
    assert cut_at_stops(text, stops) == expected


# generation


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_generations_are_our_samplers(tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
    lm = adapted(tiny, tokenizer, batch_size=batch_size, logits_eos_inf=True)
    expected = [
        decode_completions(tokenizer, generate_tokens(tiny, tokenizer, [context], logits_eos_inf=True))[0]
        for context in CONTEXTS
    ]
    assert len(set(expected)) > 3
    assert generated(lm, CONTEXTS) == expected
    assert generated(lm, CONTEXTS[::-1]) == expected[::-1]


def test_requests_of_several_tasks_keep_their_order(tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    lm = adapted(tiny, tokenizer, batch_size=2, logits_eos_inf=True)
    kinds: list[dict[str, Any]] = [{"max_gen_toks": 3}, {}, {"max_gen_toks": 12}]
    arguments = [(context, kinds[index % 3]) for index, context in enumerate(CONTEXTS)]
    alone = [generated(lm, [context], **gen_kwargs)[0] for context, gen_kwargs in arguments]
    assert lm.generate_until(instances("generate_until", list(arguments)), disable_tqdm=True) == alone
    lengths = [len(tokenizer(text).input_ids) for text in alone]
    assert lengths[0] <= 3 < lengths[2] <= 12
    tokens = generate_tokens(tiny, tokenizer, [CONTEXTS[0]], gen_length=4, steps=4, logits_eos_inf=True).tokens
    assert alone[0] == tokenizer.decode(tokens[0, :3], skip_special_tokens=True)


def test_draws_belong_to_the_request(tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    lm = adapted(tiny, tokenizer, batch_size=4)
    sampled = {"do_sample": True, "temperature": 1.0}
    together = generated(lm, CONTEXTS, **sampled)
    assert together == [generated(lm, [context], **sampled)[0] for context in CONTEXTS]
    assert together != generated(lm, CONTEXTS)
    assert together != generated(adapted(tiny, tokenizer, seed=1), CONTEXTS, **sampled)
    repeated = generated(lm, [CONTEXTS[0]] * 4, **sampled)
    assert repeated[0] == together[0]
    assert len(set(repeated)) == 4


def test_what_is_done_is_kept_when_a_run_is_interrupted(
    tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[tuple[Any, ...]] = []

    class Hook:
        def add_partial(self, *entry: Any) -> None:
            kept.append(entry)

    def only_once(*arguments: Any, **options: Any) -> Generation:
        monkeypatch.setattr(module, "generate_from_ids", None)
        return generate_from_ids(*arguments, **options)

    lm = adapted(tiny, tokenizer, batch_size=1, mc_num=16)
    lm.set_cache_hook(Hook())
    monkeypatch.setattr(module, "generate_from_ids", only_once)
    with pytest.raises(TypeError):
        generated(lm, CONTEXTS[:2], until=["."])
    assert [entry[:2] for entry in kept] == [("generate_until", (CONTEXTS[0], {"until": ["."]}))]  # the longest
    kept.clear()
    pairs = [(context, " the") for context in CONTEXTS]
    found = scored(lm, pairs)
    assert sorted(kept) == sorted(("loglikelihood", pair, value) for pair, value in zip(pairs, found, strict=True))


class Script:
    """Stands for the sampler: says given answers, followed by EOS, and keeps what it was asked."""

    def __init__(self, answer: Callable[[str], str | list[int]]) -> None:
        self.answer = answer
        self.prompts: list[str] = []
        self.settings: list[dict[str, Any]] = []

    def __call__(
        self, model: Any, tokenizer: Any, rows: list[list[int]], batch_size: int, seed: int, **sampler: Any
    ) -> Generation:
        prompts = [tokenizer.decode(row) for row in rows]
        self.prompts += prompts
        self.settings.append(sampler)
        length = sampler.get("gen_length", 32)
        said = [self.answer(prompt) for prompt in prompts]
        ids = [answer if isinstance(answer, list) else tokenizer(answer).input_ids for answer in said]
        tokens = [(row + [tokenizer.eos_token_id] * length)[:length] for row in ids]
        return Generation(torch.tensor(tokens), length, torch.full((len(rows),), length), None)


def test_where_an_answer_ends(
    tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    eos, unknown = tokenizer.eos_token_id, tokenizer.unk_token_id
    one, two, three = tokenizer(" the ring.").input_ids
    answers: dict[str, list[int]] = {
        "q: 1": [one, eos, two],
        "q: 2": [one, two, three, one],
        "q: 3": [one, unknown, two],
        "q: 4": [one, two] * 16,
        "q: 5": [eos],
    }
    monkeypatch.setattr(module, "generate_from_ids", Script(answers.__getitem__))
    lm = adapted(tiny, tokenizer)
    assert generated(lm, list(answers), until=[" ring.", "."]) == [" the", " the", " the ring", " the ring" * 16, ""]
    assert (lm.tally.generations, lm.tally.truncated) == (5, 1)
    # A stop text that is a special token ends the answer, though decoding drops it.
    assert generated(lm, ["q: 3"], until=["[UNK]"]) == [" the"]
    assert generated(lm, ["q: 2"], max_gen_toks=2) == [" the ring"]
    assert lm.tally.truncated == 2
    assert lm.get_model_info()["dllmquant"]["truncation_rate"] == 2 / 7


def test_end_of_turn_ends_an_answer(tiny: LLaDAModelLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="[EOS]")
    chat.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    one, two, _ = chat(" the ring.").input_ids
    script = Script(lambda prompt: [one, chat.get_added_vocab()["<|eot_id|>"], two])
    monkeypatch.setattr(module, "generate_from_ids", script)
    assert generated(adapted(tiny, chat), ["q:"]) == [" the"]


def test_prompts_are_cut_on_the_left(
    tiny: LLaDAModelLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = Script(lambda prompt: " the")
    monkeypatch.setattr(module, "generate_from_ids", script)
    lm = adapted(tiny, tokenizer, max_length=12)
    generated(lm, [CONTEXTS[2], CONTEXTS[1]])
    ids = tokenizer(CONTEXTS[2]).input_ids
    assert script.prompts == [tokenizer.decode(ids[-4:]), CONTEXTS[1]]
    assert lm.tally.cut_prompts == 1
    assert caplog.messages == ["1 prompts were cut on the left to fit max_length 12"]
    with pytest.raises(ValueError, match=r"the canvas \(gen_length\) has 16 tokens; valid: fewer than max_length 12"):
        generated(lm, CONTEXTS, max_gen_toks=13)
    assert len(script.prompts) == 2


# likelihood


def logits(tiny: LLaDAModelLM, ids: list[int]) -> Tensor:
    with torch.no_grad():
        rows: Tensor = tiny(input_ids=torch.tensor([ids])).logits[0]
    return rows


def test_the_bound_of_one_token_is_its_likelihood(tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    lm = adapted(tiny, tokenizer, mc_num=1)
    prompt, mask = tokenizer(CONTEXTS[2]).input_ids, tokenizer.mask_token_id
    expected = logits(tiny, [*prompt, mask])[-1].log_softmax(-1)
    words = [" the", " tom", " apples"]
    ids = [tokenizer(word).input_ids[0] for word in words]
    found = scored(lm, [(CONTEXTS[2], word) for word in words])
    assert [value for value, _ in found] == pytest.approx(expected[ids].tolist())


def test_guidance_counts_in_likelihoods(tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    lm = adapted(tiny, tokenizer, mc_num=1, cfg_scale=0.5, batch_size=8)
    mask = tokenizer.mask_token_id
    expected = []
    for context in CONTEXTS:
        prompt = tokenizer(context).input_ids
        given, free = (logits(tiny, [*seen, mask])[-1] for seen in (prompt, [mask] * len(prompt)))
        expected.append(float((free + 1.5 * (given - free)).log_softmax(-1)[tokenizer(" the").input_ids[0]]))
    assert [value for value, _ in scored(lm, [(context, " the") for context in CONTEXTS])] == pytest.approx(expected)


def test_the_bound_of_several_tokens_approaches_its_expectation(
    tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt, mask = tokenizer(CONTEXTS[4]).input_ids, tokenizer.mask_token_id
    target = tokenizer(" the ring").input_ids
    both = sum(logits(tiny, [*prompt, mask, mask])[-2:].log_softmax(-1)[[0, 1], target].tolist())
    first = float(logits(tiny, [*prompt, mask, target[1]])[-2].log_softmax(-1)[target[0]])
    second = float(logits(tiny, [*prompt, target[0], mask])[-1].log_softmax(-1)[target[1]])
    # One masked token half the time, weighted twice; which one is even.
    expected = 0.5 * both + 0.5 * (first + second)
    ((value, _),) = scored(adapted(tiny, tokenizer, mc_num=4000), [(CONTEXTS[4], " the ring")])
    assert value == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
def test_likelihoods_belong_to_the_request(
    tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, cfg_scale: float
) -> None:
    pairs = [(context, text) for context in CONTEXTS for text in (" the ring.", " a", " the red box.", " the ring.")]
    alone = [scored(adapted(tiny, tokenizer, mc_num=3, cfg_scale=cfg_scale), [pair])[0] for pair in pairs]
    for batch_size in (2, 16):
        lm = adapted(tiny, tokenizer, mc_num=3, batch_size=batch_size, cfg_scale=cfg_scale)
        found = scored(lm, pairs[::-1])[::-1]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in alone])
        assert [greedy for _, greedy in found] == [greedy for _, greedy in alone]
        assert found[0] == pytest.approx(found[3])
    other = scored(adapted(tiny, tokenizer, mc_num=3, seed=1, cfg_scale=cfg_scale), pairs)
    assert other[0][0] != pytest.approx(alone[0][0])


def test_contexts_and_masks(
    tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def spy(denoiser: Any, pairs: Any, **options: Any) -> Tensor:
        for pair, stream in zip(pairs, options["streams"], strict=True):
            seen["".join(f"{tokenizer.decode(part)}|" for part in pair)] = stream
        return torch.zeros(len(pairs), dtype=torch.float64)

    monkeypatch.setattr("dllmquant.integrations.lm_eval.scoring.log_likelihoods", spy)
    lm = adapted(tiny, tokenizer, greedy_check="skip")
    words = [("q: tom", " the"), ("q: tom ", " the ring"), ("q: tom", " a"), ("", " the"), ("", " a"), ("q:", " a")]
    assert scored(lm, words) == [(0.0, False)] * 6
    # A blank that ends the context belongs to the continuation; EOS stands for an empty context.
    assert set(seen) == {"q: tom| the|", "q: tom|  the ring|", "q: tom| a|", "[EOS]| the|", "[EOS]| a|", "q:| a|"}
    assert seen["q: tom| the|"] == seen["q: tom| a|"] != seen["q:| a|"]
    assert len(set(seen.values())) == 5


def test_long_contexts_are_cut_on_the_left(tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    lm = adapted(tiny, tokenizer, mc_num=1, max_length=6)
    ids = tokenizer(CONTEXTS[0]).input_ids
    expected = logits(tiny, [*ids[-5:], tokenizer.mask_token_id])[-1].log_softmax(-1)
    ((value, _),) = scored(lm, [(CONTEXTS[0], " the")])
    assert value == pytest.approx(float(expected[tokenizer(" the").input_ids[0]]))
    assert lm.tally.cut_prompts == 1
    with pytest.raises(ValueError, match="the continuation has 6 tokens; valid: fewer than max_length 6"):
        scored(lm, [("q:", " the ring. the ring.")])
    with pytest.raises(ValueError, match="continuation '' of 'q:' has no tokens; valid: at least one"):
        scored(lm, [("q:", "")])


@pytest.mark.parametrize(("check", "one_by_one"), [("one_step", False), ("one_by_one", True)])
def test_greedy_is_what_greedy_decoding_gives(
    tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, check: Any, one_by_one: bool
) -> None:
    lm = adapted(tiny, tokenizer, mc_num=1, greedy_check=check)
    decoded = {}
    for context in CONTEXTS:
        run = oracle.decode(
            lambda ids: logits(tiny, ids).tolist(),
            tokenizer(context).input_ids,
            mask_id=tokenizer.mask_token_id,
            gen_length=3,
            block_length=3,
            steps=3 if one_by_one else 1,
        )
        decoded[context] = run.tokens
    requests: list[Any] = [
        (("", ""), tokenizer(context).input_ids, tokens) for context in CONTEXTS for tokens in decoded.values()
    ]
    found = [greedy for _, greedy in lm._loglikelihood_tokens(requests, disable_tqdm=True)]
    assert found == [tokens == decoded[context] for context in CONTEXTS for tokens in decoded.values()]
    assert True in found
    assert False in found


def test_the_two_greedy_checks_differ(tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [tokenizer(context).input_ids for context in CONTEXTS]
    scorer = adapted(tiny, tokenizer)._scorer()
    assert scorer._decoded(prompts, 4, 1) != scorer._decoded(prompts, 4, 4)


def test_greedy_checks_are_shared(tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    lm = adapted(tiny, tokenizer, mc_num=1, batch_size=8)
    scored(lm, [(CONTEXTS[0], word) for word in (" the", " a", " tom", " mia")])
    assert lm.tally.forward_passes == 2  # the four targets, and what greedy decoding says in their place


def test_whole_texts_are_scored_in_windows(tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    ids, mask = tokenizer(CONTEXTS[2]).input_ids, tokenizer.mask_token_id
    before = [tokenizer.eos_token_id, *ids[:-1]]
    steps = [float(logits(tiny, [a, mask])[-1].log_softmax(-1)[b]) for a, b in zip(before, ids, strict=True)]
    lm = adapted(tiny, tokenizer, mc_num=1, max_length=2)  # one token of context and one target
    requests = instances("loglikelihood_rolling", [(CONTEXTS[2],), ("",)])
    assert lm.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx([sum(steps), 0.0])
    whole = adapted(tiny, tokenizer, mc_num=16, seed=3)
    (value,) = whole.loglikelihood_rolling(requests[:1], disable_tqdm=True)
    assert value == whole._scorer().bounds([([tokenizer.eos_token_id], ids)], [module._stream(3, CONTEXTS[2])])[0]


def test_dream(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = {"steps": 9, "gen_length": 12}
    dream = tiny_dream(initializer_range=0.5, rope_theta=1000.0, sampler_defaults=settings).double()
    lm = DLLMQuantLM(dream, tokenizer, mc_num=1, greedy_check="one_by_one")
    tokens = generate_tokens(dream, tokenizer, CONTEXTS, gen_length=5, steps=4)
    assert generated(lm, CONTEXTS, max_gen_toks=5) == decode_completions(tokenizer, tokens)
    prompt, the = tokenizer(CONTEXTS[2]).input_ids, tokenizer(" the").input_ids[0]
    with torch.no_grad():
        row = dream(input_ids=torch.tensor([[*prompt, tokenizer.mask_token_id]])).logits[0, -2]  # predicts the next
    ((value, greedy),) = scored(lm, [(CONTEXTS[2], " the")])
    assert value == pytest.approx(float(row.log_softmax(-1)[the]))
    assert greedy == (int(row.argmax()) == the)
    with pytest.raises(ValueError, match="sampler setting 'block_length' is unknown"):
        DLLMQuantLM(dream, tokenizer, preset="qdlm-gsm8k")  # LLaDA's


# what it is built from


def test_presets() -> None:
    assert set(PRESETS) == {"qdlm-qa", "qdlm-mmlu", "qdlm-gsm8k", "qdlm-math", "qdlm-humaneval", "qdlm-mbpp"}
    for preset in PRESETS.values():
        SamplerConfig(**preset.sampler)
    lengths = {
        name: tuple(preset.sampler.get(key) for key in ("gen_length", "steps", "block_length"))
        for name, preset in PRESETS.items()
    }
    assert lengths["qdlm-gsm8k"] == (256, 256, 32)
    assert lengths["qdlm-humaneval"] == lengths["qdlm-mbpp"] == (512, 512, 32)
    assert (find_preset("qdlm-qa").mc_num, find_preset("qdlm-mmlu").mc_num) == (128, 1)
    with pytest.raises(ValueError, match="preset: unknown 'qdlm'; valid: qdlm-qa, qdlm-mmlu"):
        find_preset("qdlm")


# Solved examples before a problem: lm-eval's option, so no preset holds them.
SHOTS = {"qdlm-qa": 0, "qdlm-mmlu": 5, "qdlm-gsm8k": 4, "qdlm-math": 0, "qdlm-humaneval": 0, "qdlm-mbpp": 3}


def test_the_docs_list_the_presets() -> None:
    page = (Path(__file__).parents[2] / "docs" / "ecosystem.md").read_text(encoding="utf-8")
    for name, preset in PRESETS.items():
        lengths = ", ".join(
            str(preset.sampler[key]) for key in ("gen_length", "steps", "block_length") if preset.sampler
        )
        masks = "" if preset.sampler else str(preset.mc_num)
        cells = (f"`{name}`", f"`{','.join(preset.tasks)}`", str(SHOTS[name]), lengths, masks)
        assert re.sub(" +", " ", f"| {' | '.join(cells)} |") in page


def test_arguments_come_before_the_preset(tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    lm = adapted(tiny, tokenizer, preset="qdlm-mmlu")
    assert (lm.mc_num, lm.get_model_info()["dllmquant"]["sampler"]) == (1, {})
    lm = adapted(tiny, tokenizer, preset="qdlm-gsm8k", steps=64, mc_num=2, threshold=None)
    info = lm.get_model_info()["dllmquant"]
    assert (info["preset"], info["mc_num"], info["sampler"]["steps"]) == ("qdlm-gsm8k", 2, 64)
    assert info["sampler"]["gen_length"] == 256
    assert info["checkpoint_sampler"]["gen_length"] == 8
    json.dumps(info)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "x"}, "preset: unknown 'x'"),
        ({"step": 3}, "sampler setting 'step' is unknown; valid: steps"),
        ({"gen_length": 8, "steps": 3}, "steps is 3; valid"),
        ({"batch_size": "auto"}, "batch_size is 'auto'; valid: an integer of at least 1"),
        ({"mc_num": 0}, "mc_num is 0; valid"),
        ({"max_length": 0}, "max_length is 0; valid"),
        ({"greedy_check": True}, "greedy_check is True; valid: one_step, one_by_one, skip"),
    ],
)
def test_wrong_arguments(
    tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(tiny, tokenizer, **options)


def test_a_model_needs_a_tokenizer_with_an_end(tiny: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="tokenizer is None; valid: a tokenizer"):
        DLLMQuantLM(tiny)
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no EOS token"):
        DLLMQuantLM(tiny, endless)


def test_quantized_checkpoints_and_others(tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain")
    model, tokenizer = tiny_llada(), tiny_tokenizer()
    quantized = dllmquant.DLLMQuantizer("rtn-w8a8").quantize(model, tokenizer=tokenizer, progress=False)
    quantized.save_pretrained(tmp_path / "quantized")
    tokenizer.save_pretrained(tmp_path / "quantized")
    names = {plain: (None, "32-bit"), tmp_path / "quantized": ("rtn-w8a8", "linear")}
    for path, expected in ((plain, tiny_llada()), (tmp_path / "quantized", quantized)):
        lm = DLLMQuantLM.create_from_arg_string(f"pretrained={path},dtype=float32,batch_size=3", {"batch_size": 1})
        assert lm.batch_size == 3
        assert generated(lm, CONTEXTS) == dllmquant.generate(expected, tokenizer, CONTEXTS)
        info = lm.get_model_info()["dllmquant"]
        assert (info["recipe"], info["protocol"]) == names[path]


def test_lm_evals_first_gpu_may_be_the_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [usable_device(name) for name in (None, "auto", "cpu", "cuda:0", "cuda:1")] == ["cpu"] * 4 + ["cuda:1"]
    assert caplog.messages == ["device cuda:0: there is no GPU; using the CPU"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [usable_device(name) for name in (None, "auto", "cpu", "cuda:0")] == ["cuda", "cuda", "cpu", "cuda:0"]


def test_chat_templates_and_bos(tiny: LLaDAModelLM) -> None:
    chat = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="[EOS]")
    chat.add_special_tokens({"bos_token": "<|start|>"})
    message = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    chat.chat_template = "{{ bos_token }}" + message + "{% if add_generation_prompt %}a:{% endif %}"
    lm = adapted(tiny, chat)
    turns = [{"role": "q", "content": "how many?"}]
    assert lm.apply_chat_template(turns) == "<|start|>q: how many? a:"
    assert lm.prefix_token_id == chat.bos_token_id
    assert lm.tok_encode(lm.apply_chat_template(turns)).count(chat.bos_token_id) == 1
    assert lm.tokenizer_name == ""


def test_lm_eval_knows_the_class_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_model("dllmquant") is DLLMQuantLM
    assert get_model("dummy").__name__ == "DummyLM"  # lm-eval's own are still there
    asked = []
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: asked.append(get_model("dllmquant")))
    monkeypatch.setattr(sys, "argv", ["lm_eval"])
    runpy.run_module("dllmquant.integrations.lm_eval", run_name="__main__")
    assert asked == [DLLMQuantLM]


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    package = "dllmquant.integrations.lm_eval"
    for name in [name for name in sys.modules if name == package or name.startswith((f"{package}.", "lm_eval."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"run: pip install 'dllmquant\[eval\]'"):
        importlib.import_module(package)


# tasks of one's own


LOCAL_MATH = """
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer.split('#### ')[1]}}"
generation_kwargs: {until: ["q:"], do_sample: false, max_gen_toks: 32}
filter_list:
  - name: number
    filter:
      - {function: regex, regex_pattern: "#### (\\\\d+)"}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
LOCAL_QA = """
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
"""


def task_on(directory: Path, name: str, definition: str, **splits: list[dict[str, Any]]) -> None:
    """Writes a task of lm-eval that reads its documents from local JSON files."""
    files = {split: str(directory / f"{name}-{split}.json") for split in splits}
    for split, rows in splits.items():
        Path(files[split]).write_text(json.dumps(rows))
    source = {
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(directory / "cache")},
    }
    (directory / f"{name}.yaml").write_text(f"{yaml.safe_dump(source)}{definition}")


@pytest.fixture(scope="module")
def bundled_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """Five problems each of two tasks, measured by lm-eval and by our own evaluation."""
    directory = tmp_path_factory.mktemp("tasks")
    for name, task, definition in (("local_math", "math", LOCAL_MATH), ("local_qa", "qa", LOCAL_QA)):
        task_on(directory, name, definition, test=[asdict(item) for item in take(task, "heldout", 5, 0)])
    settings: dict[str, Any] = {"steps": 8, "gen_length": 32, "block_length": 8}
    lm = DLLMQuantLM("llada-tiny", dtype="float32", mc_num=64, batch_size=4, **settings)
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    theirs = simple_evaluate(lm, tasks=["local_math", "local_qa"], task_manager=manager, bootstrap_iters=0)
    ours = evaluate(lm.model, lm.tokenizer, ["math", "qa"], limit=5, mc_num=64, progress=False, **settings)
    return theirs, ours


def test_a_generation_task_agrees_with_our_evaluation(bundled_runs: tuple[dict[str, Any], Any]) -> None:
    theirs, ours = bundled_runs
    samples = theirs["samples"]["local_math"]
    items = [item for item in ours.items if item.task == "math"]
    assert [sample["arguments"][0][0] for sample in samples] == [item.prompt for item in items]
    assert [sample["resps"] for sample in samples] == [[[item.completion]] for item in items]
    assert [bool(sample["exact_match"]) for sample in samples] == [item.correct for item in items]
    assert theirs["results"]["local_math"]["exact_match,number"] == ours.scores["math"].accuracy
    info = theirs["config"]["dllmquant"]
    assert info["generations"] == 5
    assert info["truncation_rate"] == ours.scores["math"].truncation_rate


def test_a_multiple_choice_task_agrees_with_our_evaluation(bundled_runs: tuple[dict[str, Any], Any]) -> None:
    theirs, ours = bundled_runs
    samples = theirs["samples"]["local_qa"]
    items = [item for item in ours.items if item.task == "qa"]
    picks = []
    for sample in samples:
        scores = [score for score, _ in sample["filtered_resps"]]
        assert len(scores) == len(set(scores)) == 4
        picks.append(sample["arguments"][scores.index(max(scores))][1])
    assert picks == [item.completion for item in items]
    assert theirs["results"]["local_qa"]["acc,none"] == ours.scores["qa"].accuracy


# the tasks that ship with lm-eval, on problems written by hand


@pytest.fixture(scope="module")
def bytewise() -> DLLMQuantLM:
    """A model that reads and writes any text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="[EOS]", mask_token="[MASK]", clean_up_tokenization_spaces=False
    )
    ids = {"eos_token_id": tokenizer.eos_token_id, "mask_token_id": tokenizer.mask_token_id}
    return DLLMQuantLM(tiny_llada(vocab_size=len(tokenizer), pad_token_id=tokenizer.eos_token_id, **ids), tokenizer)


class LocalCodeEval:
    """Stands for the metric `code_eval`, which is on a hub: runs programs, all of them written in this file."""

    def compute(
        self, references: list[str], predictions: list[list[str]], k: list[int]
    ) -> tuple[dict[str, float], None]:
        passed = [self.passes(program, test) for test, (program,) in zip(references, predictions, strict=True)]
        return {"pass@1": sum(passed) / len(passed)}, None

    def passes(self, program: str, test: str) -> bool:
        try:
            exec(f"{program}\n{test}", {})
        except (AssertionError, NameError, SyntaxError):
            return False
        return True


def run_shipped(
    name: str,
    lm: DLLMQuantLM,
    answer: Callable[[str], str],
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    **splits: list[dict[str, Any]],
) -> tuple[dict[str, Any], Script]:
    """Runs a task of lm-eval's own with QDLM's preset, on local documents and with scripted answers."""
    script = Script(answer)
    monkeypatch.setattr(module, "generate_from_ids", script)
    monkeypatch.setattr(hf_evaluate, "load", lambda *_: LocalCodeEval())
    task_on(directory, name, f"include: {Path(lm_eval.tasks.__file__).parent / name / name}.yaml\n", **splits)
    preset = find_preset(f"qdlm-{name}")
    assert preset.tasks == (name,)
    results = simple_evaluate(
        DLLMQuantLM(lm.model, lm.tokenizer, preset=f"qdlm-{name}", max_length=20000),
        tasks=[name],
        num_fewshot=SHOTS[f"qdlm-{name}"],
        task_manager=TaskManager(include_path=str(directory), include_defaults=False),
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
    )
    assert all(settings == preset.sampler for settings in script.settings)
    return results, script


def test_gsm8k(bytewise: DLLMQuantLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}.\n#### {2 * n}"} for n in range(1, 5)]
    test = [
        {"question": "Ann has 1,000 coins and gets 24. How many?", "answer": "1000 + 24 = 1024.\n#### 1,024"},
        {"question": "Bob has $3 and gets $4. How many?", "answer": "3 + 4 = 7.\n#### 7"},
        {"question": "Eve has 9 and loses 4. How many?", "answer": "9 - 4 = 5.\n#### 5"},
    ]

    def answer(prompt: str) -> str:
        if prompt.endswith("Ann has 1,000 coins and gets 24. How many?\nAnswer:"):
            return " 1000 + 24 = 1024.\n#### 1024\n\nQuestion: What is 5 + 5?\nAnswer: #### 10"
        if prompt.endswith("Bob has $3 and gets $4. How many?\nAnswer:"):
            return " They have $7."
        return " 9 - 4 = 6.\n#### 6"

    results, script = run_shipped("gsm8k", bytewise, answer, tmp_path, monkeypatch, train=train, test=test)
    for prompt in script.prompts:
        shots, _, problem = prompt.rpartition("\n\n")
        assert problem in {f"Question: {row['question']}\nAnswer:" for row in test}
        assert set(shots.split("\n\n")) == {f"Question: {row['question']}\nAnswer: {row['answer']}" for row in train}
    assert len(script.prompts) == 3
    samples = {(sample["doc_id"], sample["filter"]): sample for sample in results["samples"]["gsm8k"]}
    assert samples[0, "strict-match"]["resps"] == [[" 1000 + 24 = 1024.\n#### 1024\n\n"]]
    extracted = {key: sample["filtered_resps"][0] for key, sample in samples.items()}
    assert [extracted[index, "strict-match"] for index in range(3)] == ["1024", "[invalid]", "6"]
    assert [extracted[index, "flexible-extract"] for index in range(3)] == ["1024", "$7.", "6"]
    assert results["results"]["gsm8k"]["exact_match,strict-match"] == pytest.approx(1 / 3)
    assert results["results"]["gsm8k"]["exact_match,flexible-extract"] == pytest.approx(2 / 3)


def test_humaneval(bytewise: DLLMQuantLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = [
        {
            "task_id": f"HumanEval/{index}",
            "prompt": f'def {name}(a, b):\n    """Return {what}."""\n',
            "entry_point": name,
            "canonical_solution": "",
            "test": f"def check(candidate):\n    assert candidate(3, 2) == {value}\n",
        }
        for index, (name, what, value) in enumerate((("add", "the sum", 5), ("sub", "the difference", 1)))
    ]

    def answer(prompt: str) -> str:
        assert prompt in {row["prompt"] for row in test}
        return "    return a + b\n\ndef check(candidate):\n    raise SystemExit\nprint(add(1, 1))\n"

    results, _ = run_shipped("humaneval", bytewise, answer, tmp_path, monkeypatch, test=test)
    for sample, row in zip(results["samples"]["humaneval"], test, strict=True):
        assert sample["resps"] == [["    return a + b\n"]]
        assert sample["filtered_resps"] == [[row["prompt"] + "    return a + b\n"]]
    assert [sample["pass@1"] for sample in results["samples"]["humaneval"]] == [1.0, 0.0]
    assert results["results"]["humaneval"]["pass@1,create_test"] == 0.5


def test_mbpp(bytewise: DLLMQuantLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test: list[dict[str, Any]] = [
        {
            "task_id": index,
            "text": f"Write a function to return {what}.",
            "code": "",
            "test_list": [f"assert {name}({n}) == {n + 1}" for n in range(3)],
        }
        for index, (name, what) in enumerate((("next_up", "the next number"), ("successor", "the number after")))
    ]

    def answer(prompt: str) -> str:
        name = "next_up" if "next_up" in prompt else "successor"
        return f"def {name}(n):\n    return n + {1 if name == 'next_up' else 2}\n[DONE]\nYou are\n[BEGIN]\n"

    results, script = run_shipped("mbpp", bytewise, answer, tmp_path, monkeypatch, test=test)
    for prompt, row in zip(sorted(script.prompts, key=lambda text: "successor" in text), test, strict=True):
        assert prompt.count("[BEGIN]\n") == 4
        assert prompt.count("\n[DONE]") == 3
        assert "similar_elements" in prompt
        tests = "\n".join(map(str, row["test_list"]))
        assert prompt.endswith(
            f"You are an expert Python programmer, and here is your task: {row['text']} "
            f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
        )
    resps = [sample["resps"] for sample in results["samples"]["mbpp"]]
    assert resps == [[["def next_up(n):\n    return n + 1\n"]], [["def successor(n):\n    return n + 2\n"]]]
    assert [sample["pass_at_1"] for sample in results["samples"]["mbpp"]] == [1.0, 0.0]
