"""What the cache of block diffusion saves: the same prompts decoded with it and without, side by side.

    python benchmarks/block_cache.py
    python benchmarks/block_cache.py --device cuda --dtype bfloat16 --width 2048 --layers 16 --gen-length 512

A random SDAR, so that nothing is downloaded: what is measured does not depend on the weights. Two ways of decoding
without a cache are compared with: every step runs whole canvases, as it does where a model has no cache; or every
step runs the canvases up to the farthest block that is decoded, as LLaDA2's published code does. The ways take turns,
and medians over the repetitions are printed, with the tokens that went through the model's blocks.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dllmquant.decoding import BlockDiffusionSamplerConfig, CachedDenoiser, Denoiser, Generation, sample
from dllmquant.models import SDARConfig, SDARForCausalLM

MASK, PAD = 1, 0


@dataclass
class Way:
    """A way of decoding, and what it took: tokens through the model, and seconds per repetition."""

    name: str
    denoiser: Denoiser
    cached: CachedDenoiser | None = None
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    generation: Generation | None = None


def main() -> None:
    args = parse_arguments()
    print(
        f"{args.layers} layers of width {args.width}, {args.dtype} on {args.device}, {torch.get_num_threads()} threads"
    )
    for block_length in args.block_lengths:
        ways = measure(args, block_length)
        base = ways[0]
        print(
            f"\nblocks of {block_length}, {args.batch_size} prompts of {args.prompt_length // 4} to "
            f"{args.prompt_length} tokens, {args.gen_length} generated; medians of {args.repeats}"
        )
        print(f"{'':24}{'seconds':>10}{'ratio':>8}{'tokens run':>14}{'ratio':>8}{'same tokens':>14}")
        for way in ways:
            assert way.generation is not None
            assert base.generation is not None
            seconds, before = statistics.median(way.seconds), statistics.median(base.seconds)
            same = (way.generation.tokens == base.generation.tokens).double().mean()
            print(
                f"{way.name:24}{seconds:10.3f}{seconds / before:8.3f}{way.tokens:14,}{way.tokens / base.tokens:8.3f}"
                f"{100 * same:13.1f}%"
            )


def measure(args: argparse.Namespace, block_length: int) -> list[Way]:
    torch.manual_seed(0)
    model = build_model(args, block_length)
    config = BlockDiffusionSamplerConfig(
        steps=max(1, block_length // 2),
        gen_length=args.gen_length,
        block_length=block_length,
        remasking="low_confidence_static",
    )
    lengths = torch.linspace(args.prompt_length // 4, args.prompt_length, args.batch_size).round().int().tolist()
    prompts = [torch.randint(2, args.vocab_size, (length,)) for length in lengths]

    def whole(ids: Tensor, attention_mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=attention_mask).logits

    def prefix(ids: Tensor, attention_mask: Tensor) -> Tensor:
        masked = (ids == MASK).int().argmax(1)  # of the first mask of every row
        place = attention_mask.cumsum(1).gather(1, masked[:, None]).squeeze(1) - 1
        end = int((masked - place % block_length + block_length).max())
        logits = whole(ids[:, :end], attention_mask[:, :end])
        return torch.nn.functional.pad(logits, (0, 0, 0, ids.shape[1] - logits.shape[1]))

    ways = [
        Way("whole canvases", whole),
        Way("up to the current block", prefix),
        Way("cached", whole, CachedDenoiser(model.open_cache)),
    ]
    for way in ways:  # not timed: warms up, and counts
        counting(model, way, prompts, config, args)
    for _ in range(args.repeats):
        for way in ways:
            start = time.perf_counter()
            decode(way, prompts, config, args)
            way.seconds.append(time.perf_counter() - start)
    return ways


def counting(
    model: SDARForCausalLM,
    way: Way,
    prompts: list[Tensor],
    config: BlockDiffusionSamplerConfig,
    args: argparse.Namespace,
) -> None:
    def count(_module: torch.nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        way.tokens += inputs[0].shape[:2].numel()

    handle = model.model.layers[0].register_forward_hook(count)
    way.generation = decode(way, prompts, config, args)
    handle.remove()


def decode(
    way: Way, prompts: list[Tensor], config: BlockDiffusionSamplerConfig, args: argparse.Namespace
) -> Generation:
    generation = sample(
        way.denoiser,
        prompts,
        config,
        cached=way.cached,
        mask_token_id=MASK,
        pad_token_id=PAD,
        device=args.device,
        batch_size=args.batch_size,
    )
    if args.device != "cpu":
        torch.accelerator.synchronize()
    return generation


def build_model(args: argparse.Namespace, block_length: int) -> SDARForCausalLM:
    config = SDARConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=max(1, args.width // 256),
        head_dim=64,
        block_size=block_length,
        mask_token_id=MASK,
        pad_token_id=PAD,
    )
    model = SDARForCausalLM(config).eval()
    return torch.nn.Module.to(model, device=args.device, dtype=getattr(torch, args.dtype))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--width", type=int, default=256, help="of the residual stream; a multiple of 256")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=64, help="of the longest prompt")
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--block-lengths", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
