"""The model class of lm-eval that drives our samplers and our likelihood bound."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, get_args

import lm_eval.models  # noqa: F401 - lm-eval registers its own classes only if none is registered before
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant._version import __version__
from dllmquant.decoding import Denoiser
from dllmquant.generation import generate_from_ids
from dllmquant.integrations.lm_eval.loading import load
from dllmquant.integrations.lm_eval.requests import GenerationOptions, cut_at_stops, read_options
from dllmquant.integrations.lm_eval.scoring import GreedyCheck, Pair, Scorer
from dllmquant.integrations.transformers import recipe_and_protocol
from dllmquant.models import adapter_for
from dllmquant.models.inference import inference
from dllmquant.presets import Preset, find_preset

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """One text to generate.

    Attributes:
        index: Place of the request.
        context: The prompt.
        gen_kwargs: Keyword arguments of the request.
        options: What they mean.
        ids: Token ids of the prompt, cut on the left to what the model's length leaves.
        seed: Seed of what is drawn for this text.
    """

    index: int
    context: str
    gen_kwargs: dict[str, Any]
    options: GenerationOptions
    ids: list[int]
    seed: int


@dataclass
class _Tally:
    """What the model did so far.

    Attributes:
        generations: Texts generated.
        truncated: Those of them that neither a token nor a stop text ended.
        cut_prompts: Prompts that did not fit and were cut on the left.
        forward_passes: Calls of the model, each on a batch.
    """

    generations: int = 0
    truncated: int = 0
    cut_prompts: int = 0
    forward_passes: int = 0


@register_model("dllmquant")
class DLLMQuantLM(TemplateLM):  # type: ignore[misc] # lm-eval carries no types
    """A diffusion language model, quantized or not, as lm-eval's model class `dllmquant`.

    Results do not depend on the batch size or on the other requests, as far as the model's arithmetic does not: what is
    drawn for a request is seeded with its text. Requests of one context share their masks, so that the Monte Carlo
    noise the choices of a question have in common does not disturb their ranking. Where random numbers decide what is
    generated (`temperature` above 0, random remasking), texts are generated one by one.

    Sampler settings that are not given are the preset's; then a request's own (see
    `dllmquant.integrations.lm_eval.requests`); then the checkpoint's.

    Args:
        pretrained: Directory, hub id or name of a bundled model; or a loaded model.
        tokenizer: Directory, hub id or tokenizer; the model's own if not given, needed beside a loaded model.
        dtype: Type to load the weights in; "auto" is the checkpoint's own.
        device: Such as "cpu" or "cuda:1"; a GPU if there is one, if not given.
        batch_size: Sequences per forward pass.
        preset: Name of a preset (`dllmquant.presets`); its settings count where none are given.
        mc_num: Masks drawn per target of a likelihood; the preset's, or 128, if not given.
        seed: Seed of everything random.
        greedy_check: What the second half of a likelihood result means. With "one_step", that the target's tokens are
            the likeliest ones at their positions when the whole target is masked (one forward pass per context and
            target length); with "one_by_one", that greedy decoding gives the target, one token per step, the most
            confident first, as in LLaDA's evaluation; with "skip", nothing: it is False.
        max_length: Longest sequence of prompt and target or canvas, in tokens; the model's own if not given. Prompts
            are cut on the left.
        revision: Branch, tag or commit of the hub id that `pretrained` is; of its tokenizer too.
        trust_remote_code: Whether Python code that model or tokenizer bring along may be executed. The families here
            need none; lm-eval's option of this name sets it.
        **sampler: Fields of the family's sampler configuration: `steps`, `gen_length`, `block_length`, `temperature`,
            `cfg_scale` (used for likelihoods too), `remasking`, `threshold`, ...

    Raises:
        ValueError: The model is not a registered diffusion LLM, its tokenizer has no EOS token, its configuration
            names no length and `max_length` is not given, or an argument is unknown or out of range.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        batch_size: int | str = 8,
        preset: str | None = None,
        mc_num: int | None = None,
        seed: int = 0,
        greedy_check: GreedyCheck = "one_step",
        max_length: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **sampler: Any,
    ) -> None:
        super().__init__()
        protocol = Preset() if preset is None else find_preset(preset)
        if greedy_check not in get_args(GreedyCheck):
            raise ValueError(f"greedy_check is {greedy_check!r}; valid: {', '.join(get_args(GreedyCheck))}")
        self.preset = preset
        self.greedy_check: GreedyCheck = greedy_check
        self.seed = seed
        self.batch_size = _count("batch_size", batch_size)
        self.mc_num = _count("mc_num", protocol.mc_num if mc_num is None else mc_num)
        self.model, self.tokenizer = load(
            pretrained,
            tokenizer,
            dtype,
            device,
            revision=None if revision is None else str(revision),  # lm-eval reads digits as a number
            trust_remote_code=trust_remote_code,
        )
        if self.tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: it has no EOS token, so generations have no end")
        self._device = self.model.device
        self._adapter = adapter_for(self.model)
        self._chosen = {**protocol.sampler, **_without_none(sampler)}
        self._default = self._adapter.sampler_config(self.model.config)
        # Without a canvas of its own, a run takes its steps and blocks together with what the tasks ask for.
        whole = "gen_length" in self._chosen
        self._adapter.sampler_config(self.model.config, **(self._chosen if whole else dict.fromkeys(sampler)))
        self.max_length = _count("max_length", self._own_length() if max_length is None else max_length)
        self._added_tokens = self.tokenizer.get_added_vocab()
        self._ends = {self.eot_token_id, self._added_tokens.get(self._adapter.eot_token, self.eot_token_id)}
        self.tally = _Tally()

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "DLLMQuantLM":
        """Builds the model from model arguments, which come before what lm-eval's own options say."""
        return cls(**{**_without_none(additional_config or {}), **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "DLLMQuantLM":
        """Builds the model from `key=value,key=value`, which come before what lm-eval's own options say."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def _own_length(self) -> int:
        """The longest sequence that the model's configuration declares."""
        length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if length is None:
            raise ValueError(
                "max_length is None; valid: an integer of at least 1, because the model's configuration has no "
                "max_position_embeddings"
            )
        return int(length)

    # What lm-eval asks of a model's tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS, or EOS of a tokenizer without one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval names its caches of prompts after."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Tokenizes a text, with special tokens unless told otherwise or it starts with BOS already."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens).input_ids
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Writes a conversation as the tokenizer's chat template has it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """Says what the results depend on and what they cost, for lm-eval's `config`; complete after a run."""
        tally = asdict(self.tally)
        rate = self.tally.truncated / self.tally.generations if self.tally.generations else None
        recipe, protocol = recipe_and_protocol(self.model)
        settings = {
            "version": __version__,
            "recipe": recipe,
            "protocol": protocol,
            "preset": self.preset,
            "checkpoint_sampler": asdict(self._default),
            "sampler": self._chosen,
            "mc_num": self.mc_num,
            "seed": self.seed,
            "greedy_check": self.greedy_check,
            "batch_size": self.batch_size,
        }
        return {"dllmquant": settings | tally | {"truncation_rate": rate}}

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completes the context of every request, in the order of the requests.

        A completion ends before the first EOS token, end-of-turn token of the family or stop text.

        Raises:
            ValueError: A request asks for what the sampler cannot do, or its canvas leaves no room for a prompt.
        """
        jobs = self._jobs([request.args for request in requests])
        texts = [""] * len(jobs)
        with tqdm(total=len(jobs), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for batch in self._batches(jobs):
                for job, text in zip(batch, self._completions(batch), strict=True):
                    texts[job.index] = text
                    self.cache_hook.add_partial("generate_until", (job.context, job.gen_kwargs), text)
                bar.update(len(batch))
        return texts

    def _jobs(self, arguments: Sequence[tuple[str, dict[str, Any]]]) -> list[_Job]:
        jobs = []
        cut_before = self.tally.cut_prompts
        known: dict[str, GenerationOptions] = {}
        seen: Counter[tuple[str, str]] = Counter()
        for index, (context, gen_kwargs) in enumerate(arguments):
            spelled = json.dumps(gen_kwargs, sort_keys=True, default=str)
            if spelled not in known:
                known[spelled] = read_options(gen_kwargs, self._chosen, self._default, asdict(self._default))
            ids = self._cut(self.tok_encode(context), self._canvas(known[spelled]), "the canvas (gen_length)")
            # A request that is repeated is another draw.
            seed = _stream(self.seed, context, seen[context, spelled])
            seen[context, spelled] += 1
            jobs.append(_Job(index, context, gen_kwargs, known[spelled], ids, seed))
        self._report_cut(cut_before)
        return jobs

    def _canvas(self, options: GenerationOptions) -> int:
        return self._adapter.sampler_config(self.model.config, **dict(options.settings)).gen_length

    def _batches(self, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
        """Jobs that are decoded together: of the same settings and like lengths, the longest first."""
        groups: dict[tuple[tuple[str, Any], ...], list[_Job]] = {}
        for job in jobs:
            groups.setdefault(job.options.settings, []).append(job)
        for settings, group in groups.items():
            config = self._adapter.sampler_config(self.model.config, **dict(settings))
            size = 1 if config.stochastic else self.batch_size
            group.sort(key=lambda job: -len(job.ids))
            yield from (group[start : start + size] for start in range(0, len(group), size))

    def _completions(self, batch: Sequence[_Job]) -> list[str]:
        generation = generate_from_ids(
            self.model,
            self.tokenizer,
            [job.ids for job in batch],
            batch_size=self.batch_size,
            seed=batch[0].seed,
            **dict(batch[0].options.settings),
        )
        self.tally.generations += len(batch)
        self.tally.forward_passes += generation.forward_passes
        rows = generation.tokens.tolist()
        return [self._text(row, job.options) for job, row in zip(batch, rows, strict=True)]

    def _text(self, row: list[int], options: GenerationOptions) -> str:
        """The answer in a canvas. Stop texts that are a token, as `<|eot_id|>` may be, end it as tokens."""
        ends = self._ends | {self._added_tokens[stop] for stop in options.stops if stop in self._added_tokens}
        row = row[: options.max_tokens]
        length = next((place for place, token in enumerate(row) if token in ends), len(row))
        whole = str(self.tokenizer.decode(row[:length], skip_special_tokens=True))
        text, stopped = cut_at_stops(whole, options.stops)
        self.tally.truncated += length == len(row) and not stopped
        return text

    # Likelihood

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        cut_before = self.tally.cut_prompts
        pairs = [self._pair(texts, prompt, target) for texts, prompt, target in requests]
        self._report_cut(cut_before)
        streams = [_stream(self.seed, context or target) for (context, target), _, _ in requests]
        order = sorted(range(len(pairs)), key=lambda index: (-sum(map(len, pairs[index])), pairs[index][0]))
        found = [(0.0, False)] * len(pairs)
        chunk = max(self.batch_size, 16 * self.batch_size // self.mc_num)
        scorer = self._scorer()
        bar = tqdm(total=len(pairs), desc="Running loglikelihood requests", disable=disable_tqdm)
        with bar, self._inference():
            for members in (order[start : start + chunk] for start in range(0, len(order), chunk)):
                together = [pairs[index] for index in members]
                bounds = scorer.bounds(together, [streams[index] for index in members])
                greedy = scorer.greedy(together, self.greedy_check)
                for index, result in zip(members, zip(bounds, greedy, strict=True), strict=True):
                    found[index] = result
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], result)
                bar.update(len(members))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Estimates the bound on the likelihood of whole texts.

        A text longer than the model's length is split into windows as lm-eval splits them; the bound is the sum over
        the windows, each given the token before it (`prefix_token_id` for the first).
        """
        found = []
        scorer = self._scorer()
        for (text,) in tqdm(
            [request.args for request in requests],
            desc="Running loglikelihood_rolling requests",
            disable=disable_tqdm,
        ):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,  # beside the target, a window holds one token at least
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            streams = [_stream(self.seed, text, index) for index in range(len(pairs))]
            with self._inference():
                found.append(sum(scorer.bounds(pairs, streams)) if pairs else 0.0)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def _pair(self, texts: tuple[str, str], prompt: list[int], target: list[int]) -> Pair:
        if not target:
            raise ValueError(f"continuation {texts[1]!r} of {texts[0][-40:]!r} has no tokens; valid: at least one")
        return self._cut(prompt, len(target), "the continuation"), target

    def _cut(self, prompt: list[int], beside: int, what: str) -> list[int]:
        """The end of a prompt that fits beside `beside` other tokens; a token of it at least."""
        room = self.max_length - beside
        if room < min(len(prompt), 1):
            raise ValueError(f"{what} has {beside} tokens; valid: fewer than max_length {self.max_length}")
        self.tally.cut_prompts += len(prompt) > room
        return prompt[len(prompt) - min(room, len(prompt)) :]

    def _report_cut(self, before: int) -> None:
        cut = self.tally.cut_prompts - before
        if cut:
            _LOGGER.warning("%d prompts were cut on the left to fit max_length %d", cut, self.max_length)

    def _scorer(self) -> Scorer:
        pad = self.tokenizer.pad_token_id
        return Scorer(
            denoiser=self._counting(self._adapter.denoiser(self.model)),
            mask_token_id=self._adapter.mask_id(self.model.config),
            pad_token_id=self.eot_token_id if pad is None else pad,
            mc_num=self.mc_num,
            batch_size=self.batch_size,
            seed=self.seed,
            cfg_scale=self._chosen.get("cfg_scale", self._default.cfg_scale),
            device=self._device,
        )

    def _inference(self) -> AbstractContextManager[None]:
        return inference(self.model, self._adapter.block_list(self.model))

    def _counting(self, denoiser: Denoiser) -> Denoiser:
        def counted(ids: Tensor, attention_mask: Tensor) -> Tensor:
            self.tally.forward_passes += 1
            return denoiser(ids, attention_mask)

        return counted


def _stream(seed: int, text: str, number: int = 0) -> int:
    """A seed that depends on a text, for its `number`-th use."""
    digest = hashlib.sha256(json.dumps([seed, text, number]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _count(name: str, value: int | str) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; valid: an integer of at least 1")
    return value


def _without_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
