"""How decoding is set: one frozen class of settings per sampler."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeGuard, get_args

Ranking = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]
"""Which masked positions Dream's sampler commits: random ones, or those whose distribution is surest by a measure."""
BlockOrder = Literal["low_confidence_dynamic", "low_confidence_static", "sequential"]
"""Which masked positions of a block the block-diffusion sampler commits at a step."""


@dataclass(frozen=True)
class SamplerConfig:
    """How to decode in blocks (:mod:`dllmquant.decoding.blocks`); the defaults are LLaDA's.

    Attributes:
        steps: Denoising steps of the whole generation, spread evenly over the blocks: a multiple of the number of
            blocks, from the number of blocks to ``gen_length``. Not used if ``threshold`` is given; only at least 1
            is then required.
        gen_length: Tokens to generate per prompt; a multiple of ``block_length``.
        block_length: Tokens per block.
        temperature: 0 commits the argmax; above 0, candidates are drawn from ``softmax(logits / temperature)``.
        cfg_scale: Scale of unsupervised classifier-free guidance; 0 is off, otherwise every step costs two forward
            passes.
        remasking: Which candidates to commit: those of the highest confidence, or random ones.
        threshold: If given, a probability in (0, 1]: a step commits every candidate of the block that is at least this
            confident, and at least one.
        logits_eos_inf: Never generate the EOS token.
        confidence_eos_eot_inf: Commit EOS and EoT candidates last.

    Raises:
        ValueError: On construction, naming the field, its value and what is valid.
    """

    steps: int = 128
    gen_length: int = 128
    block_length: int = 128
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    threshold: float | None = None
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False

    def __post_init__(self) -> None:
        """Check every field, then the combinations."""
        _check_counts(self, ("steps", "gen_length", "block_length"))
        _check_not_negative(self, ("temperature", "cfg_scale"))
        for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
            flag = getattr(self, name)
            if not isinstance(flag, bool):
                raise ValueError(f"{name} is {flag!r}; valid: True or False")
        self._check_lengths()
        self._check_remasking()

    @property
    def num_blocks(self) -> int:
        """The number of blocks of the generation region."""
        return self.gen_length // self.block_length

    @property
    def stochastic(self) -> bool:
        """Whether decoding draws random numbers."""
        return self.temperature > 0 or self.remasking == "random"

    def _check_lengths(self) -> None:
        if self.gen_length % self.block_length:
            raise ValueError(f"gen_length is {self.gen_length}; valid: a multiple of block_length {self.block_length}")
        if self.threshold is not None:
            return
        if self.steps % self.num_blocks or self.steps > self.gen_length:
            raise ValueError(
                f"steps is {self.steps}; valid: a multiple of the number of blocks "
                f"({self.num_blocks} = gen_length {self.gen_length} / block_length {self.block_length}), "
                f"at most gen_length {self.gen_length}"
            )

    def _check_remasking(self) -> None:
        if self.remasking not in ("low_confidence", "random"):
            raise ValueError(f"remasking is {self.remasking!r}; valid: 'low_confidence' or 'random'")
        _check_probability("threshold", self.threshold)
        if self.remasking == "random":
            if self.threshold is not None:
                raise ValueError(
                    f"threshold is {self.threshold} with remasking 'random'; "
                    "valid: None, or remasking 'low_confidence': random scores cannot be compared with a confidence"
                )
            if self.confidence_eos_eot_inf:
                raise ValueError(
                    "confidence_eos_eot_inf is True with remasking 'random'; "
                    "valid: False, or remasking 'low_confidence': a random order has no confidence to change"
                )


@dataclass(frozen=True)
class DreamSamplerConfig:
    """How to decode along timesteps (:mod:`dllmquant.decoding.timesteps`): Dream's ``diffusion_generate``.

    The defaults are those of the published checkpoints, except that ``remasking`` is the "entropy" their model cards
    and evaluations use; the code's own default is "origin".

    Attributes:
        steps: Timesteps between 1 and ``eps``; those that would commit nothing are skipped.
        gen_length: Tokens to generate per prompt (``max_new_tokens``).
        temperature: 0 commits the argmax; above 0, candidates are drawn from ``softmax(logits / temperature)``, and
            that distribution is what ``remasking`` measures.
        top_p: If given, a probability in (0, 1]: keep the likeliest tokens that reach it together.
        top_k: If given, keep this many tokens, and those as likely as the last of them.
        eps: The last timestep, in (0, 1).
        remasking: Which masked positions to commit (``alg``): "maskgit_plus" those whose candidate is likeliest,
            "topk_margin" those whose two likeliest tokens are farthest apart, "entropy" those of the least entropy,
            "origin" random ones, each with the probability 1 − s/t.
        remasking_temperature: Above 0, the positions are drawn without replacement from the softmax of what
            ``remasking`` measures over this (``alg_temp``); 0 takes the best.

    Raises:
        ValueError: On construction, naming the field, its value and what is valid.
    """

    steps: int = 512
    gen_length: int = 512
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    eps: float = 1e-3
    remasking: Ranking = "entropy"
    remasking_temperature: float = 0.0

    # What this sampler does not have, for code that reads the settings of either.
    cfg_scale: ClassVar[float] = 0.0
    threshold: ClassVar[float | None] = None
    logits_eos_inf: ClassVar[bool] = False
    confidence_eos_eot_inf: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check every field, then the combination."""
        _check_counts(self, ("steps", "gen_length", *(("top_k",) if self.top_k is not None else ())))
        _check_not_negative(self, ("temperature", "remasking_temperature"))
        _check_probability("top_p", self.top_p)
        if not _is_number(self.eps) or not 0.0 < self.eps < 1.0:
            raise ValueError(f"eps is {self.eps!r}; valid: a number between 0 and 1")
        if self.remasking not in get_args(Ranking):
            raise ValueError(f"remasking is {self.remasking!r}; valid: {', '.join(map(repr, get_args(Ranking)))}")
        if self.remasking == "origin" and self.remasking_temperature > 0:
            raise ValueError(
                f"remasking_temperature is {self.remasking_temperature} with remasking 'origin'; "
                "valid: 0: random positions are not ranked"
            )

    @property
    def block_length(self) -> int:
        """All generated tokens are one block."""
        return self.gen_length

    @property
    def num_blocks(self) -> int:
        """One."""
        return 1

    @property
    def stochastic(self) -> bool:
        """Whether decoding draws random numbers."""
        return self.temperature > 0 or self.remasking == "origin" or self.remasking_temperature > 0


@dataclass(frozen=True)
class BlockDiffusionSamplerConfig:
    """How to decode with a block-causal model (:mod:`dllmquant.decoding.block_diffusion`): SDAR, Fast-dLLM v2, LLaDA2.

    The defaults are those of SDAR's published code, except that its temperature is 1.

    Attributes:
        steps: Denoising steps of a block, from 1 to ``block_length``; with sub-blocks a multiple of their number. A
            step commits at least an even share of the (sub-)block. None: as many as a block has tokens, so that a step
            commits at least one.
        gen_length: Tokens to generate per prompt, whatever the block length: blocks are counted from the first token
            of the prompt, so the first and the last of the generation may be partial.
        block_length: Tokens per block; the one that the model's attention knows.
        sub_block_length: If given, a divisor of ``block_length``: the sub-blocks of a block are decoded from left to
            right (Fast-dLLM v2).
        temperature: 0 commits the argmax; above 0, candidates are drawn from ``softmax(logits / temperature)``, and
            that distribution is what confidence is measured on.
        top_p: If given, a probability in (0, 1]: keep the likeliest tokens that reach it together.
        top_k: If given, keep this many tokens, and those as likely as the last of them; before ``top_p``.
        remasking: Which masked positions to commit: "low_confidence_static" the step's share of the most confident,
            "low_confidence_dynamic" all that are more confident than ``threshold``, at least that share, "sequential"
            the first ones, by that share.
        threshold: A probability in (0, 1] for "low_confidence_dynamic"; the others do not use it.
        first_token_alone: Whether a step of its own commits the first token of a block as the argmax, which is what the
            finished block before it predicts (Fast-dLLM v2, whose logits predict the next token).

    Raises:
        ValueError: On construction, naming the field, its value and what is valid.
    """

    steps: int | None = None
    gen_length: int = 128
    block_length: int = 4
    sub_block_length: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    remasking: BlockOrder = "low_confidence_dynamic"
    threshold: float = 0.85
    first_token_alone: bool = False

    # What this sampler does not have, for code that reads the settings of any.
    cfg_scale: ClassVar[float] = 0.0
    logits_eos_inf: ClassVar[bool] = False
    confidence_eos_eot_inf: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check every field, then the combinations."""
        optional = (name for name in ("steps", "sub_block_length", "top_k") if getattr(self, name) is not None)
        _check_counts(self, ("gen_length", "block_length", *optional))
        _check_not_negative(self, ("temperature",))
        _check_probability("top_p", self.top_p)
        if self.threshold is None:
            raise ValueError("threshold is None; valid: a probability in (0, 1]")
        _check_probability("threshold", self.threshold)
        if self.remasking not in get_args(BlockOrder):
            raise ValueError(f"remasking is {self.remasking!r}; valid: {', '.join(map(repr, get_args(BlockOrder)))}")
        if not isinstance(self.first_token_alone, bool):
            raise ValueError(f"first_token_alone is {self.first_token_alone!r}; valid: True or False")
        if self.block_length % self.unit_length:
            raise ValueError(
                f"sub_block_length is {self.sub_block_length}; valid: None or a divisor of block_length "
                f"{self.block_length}"
            )
        units = self.block_length // self.unit_length
        if self.steps is not None and (self.steps % units or self.steps > self.block_length):
            raise ValueError(
                f"steps is {self.steps}; valid: None, or a multiple of the number of sub-blocks ({units}), "
                f"at most block_length {self.block_length}"
            )

    @property
    def unit_length(self) -> int:
        """Tokens that compete at a step: a sub-block, or the block where there are none."""
        return self.block_length if self.sub_block_length is None else self.sub_block_length

    @property
    def unit_steps(self) -> int:
        """Denoising steps over which a sub-block, or the block where there are none, is spread evenly."""
        return self.unit_length if self.steps is None else self.steps * self.unit_length // self.block_length

    @property
    def stochastic(self) -> bool:
        """Whether decoding draws random numbers."""
        return self.temperature > 0


@dataclass(frozen=True)
class UniformNoiseSamplerConfig:
    """How to decode canvas by canvas from uniform noise (:mod:`dllmquant.decoding.uniform_noise`): DiffusionGemma.

    The defaults are those of transformers' ``generate``.

    Attributes:
        steps: Largest number of denoising steps of a canvas.
        gen_length: Tokens to generate per prompt; a multiple of ``canvas_length``.
        canvas_length: Tokens per canvas; the one that the model was made for.
        entropy_bound: In nats, above 0. A step accepts the surest tokens, as many as keep the sum of their entropies
            without the largest one at or below this.
        t_min: Temperature that the last step would reach one step later; at least 0.
        t_max: Temperature of the first step, at least ``t_min`` and above 0.
        stability_threshold: A canvas is finished early only if its likeliest tokens were the same at this many steps
            before; at least 0.
        confidence_threshold: And if the mean entropy of its tokens, in nats, is below this; above 0.

    Raises:
        ValueError: On construction, naming the field, its value and what is valid.
    """

    steps: int = 48
    gen_length: int = 256
    canvas_length: int = 256
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005

    # What this sampler does not have, and that it draws random numbers, for code that reads the settings of any.
    cfg_scale: ClassVar[float] = 0.0
    threshold: ClassVar[float | None] = None
    logits_eos_inf: ClassVar[bool] = False
    confidence_eos_eot_inf: ClassVar[bool] = False
    stochastic: ClassVar[bool] = True

    @property
    def block_length(self) -> int:
        """A canvas is a block."""
        return self.canvas_length

    def __post_init__(self) -> None:
        """Check every field, then the combinations."""
        _check_counts(self, ("steps", "gen_length", "canvas_length"))
        _check_not_negative(self, ("entropy_bound", "t_min", "t_max", "confidence_threshold"))
        for name in ("entropy_bound", "t_max", "confidence_threshold"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; valid: a number above 0")
        if self.t_min > self.t_max:
            raise ValueError(f"t_min is {self.t_min}; valid: at most t_max {self.t_max}")
        stable = self.stability_threshold
        if not isinstance(stable, int) or isinstance(stable, bool) or stable < 0:
            raise ValueError(f"stability_threshold is {stable!r}; valid: an integer of at least 0")
        if self.gen_length % self.canvas_length:
            raise ValueError(
                f"gen_length is {self.gen_length}; valid: a multiple of canvas_length {self.canvas_length}"
            )


AnySamplerConfig = SamplerConfig | DreamSamplerConfig | BlockDiffusionSamplerConfig | UniformNoiseSamplerConfig


def _check_counts(config: AnySamplerConfig, names: Sequence[str]) -> None:
    for name in names:
        count = getattr(config, name)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} is {count!r}; valid: an integer of at least 1")


def _check_not_negative(config: AnySamplerConfig, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(config, name)
        if not _is_number(value) or not 0.0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r}; valid: a finite number of at least 0")


def _check_probability(name: str, value: object) -> None:
    if value is not None and (not _is_number(value) or not 0.0 < value <= 1.0):
        raise ValueError(f"{name} is {value!r}; valid: None or a probability in (0, 1]")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
