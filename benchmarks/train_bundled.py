"""Trains the bundled models on the procedurally generated tasks and writes them as Hugging Face checkpoints.

    python benchmarks/train_bundled.py --output runs/llada-tiny --seed 0 --steps 10000
    python benchmarks/train_bundled.py --output runs/dream-tiny --family Dream --seed 0 --steps 7000

Masked-diffusion training as LLaDA's instruction tuning does it: the prompt stays visible, each response token is
masked with probability t ~ U(0, 1), and the response is filled with [EOS]. Half of LLaDA's sequences are masked the way
block decoding meets them instead: blocks before a random one are clean, later ones fully masked; Dream decodes without
blocks. Interrupted runs resume from the newest training state in the output directory.
"""

import argparse
import itertools
import logging
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from dllmquant.models import adapter_for
from dllmquant.models.dream import DreamConfig, DreamModel
from dllmquant.models.llada import LLaDAConfig, LLaDAModelLM
from dllmquant.tasks import iterate
from dllmquant.tasks.items import Item, is_held_out
from dllmquant.tasks.math import make_drill
from dllmquant.tasks.tokenizer import build_tokenizer

logger = logging.getLogger("train_bundled")

# task: (sequences per step, prompt tokens, possible response tokens)
BATCHES = {
    "math": (20, 46, (32,)),
    "drill": (24, 16, (32,)),
    "code": (40, 42, (16, 16, 32)),
    "qa": (20, 28, (3, 4)),
}
BLOCK = 8


def batches(task: str, tokenizer, seed: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yields (ids [rows, length], padding mask [rows, length], response length) forever."""
    rows, prompt_length, response_lengths = BATCHES[task]
    eos = tokenizer.eos_token_id
    stream = drills(seed) if task == "drill" else iterate(task, "train", seed)
    while True:
        choice = int(torch.randint(len(response_lengths), (), generator=generator))
        response_length = response_lengths[choice]
        items = list(itertools.islice(stream, rows))
        prompts = tokenizer([item.prompt for item in items]).input_ids
        answers = tokenizer([item.answer for item in items]).input_ids
        ids = torch.full((rows, prompt_length + response_length), eos)
        keep = torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            start = prompt_length - len(prompt)
            text = (prompt + answer)[: len(prompt) + response_length]
            ids[row, start : start + len(text)] = torch.tensor(text)
            keep[row, start:] = True
        yield ids, keep, response_length


def drills(seed: int) -> Iterator[Item]:
    """Yields bare chains of the training split."""
    rng = random.Random(f"drill {seed}")
    return (item for item in iter(lambda: make_drill(rng), None) if not is_held_out(item.key))


def draw_masks(response: Tensor, eos: int, generator: torch.Generator, *, blocks: bool) -> tuple[Tensor, Tensor]:
    """Draws masks for responses [rows, n]: what is hidden, and which hidden positions are trained on (both bool).

    With `blocks`, half of the longer responses are masked as block decoding meets them.
    """
    rows, length = response.shape
    t = (torch.rand((), generator=generator) + torch.arange(rows) / rows) % 1.0
    t = t[torch.randperm(rows, generator=generator)]
    hidden = torch.rand(rows, length, generator=generator) < t[:, None]
    forced = torch.randint(length, (rows, 1), generator=generator)
    hidden.scatter_(1, forced, torch.ones_like(forced, dtype=torch.bool))
    trained = hidden.clone()
    if blocks and length > BLOCK:
        block_of = torch.arange(length) // BLOCK
        used = (response != eos).sum(1, keepdim=True) // BLOCK + 1
        block = (torch.rand(rows, 1, generator=generator) * used).long()
        blockwise = torch.rand(rows, 1, generator=generator) < 0.5
        in_block = block_of == block
        hidden = torch.where(blockwise, (hidden & in_block) | (block_of > block), hidden)
        trained = torch.where(blockwise, hidden & in_block, hidden)
    return hidden, trained


def masked_loss(
    model: PreTrainedModel, ids: Tensor, keep: Tensor, length: int, tokenizer, generator: torch.Generator
) -> Tensor:
    """Mean cross-entropy of the trained masked tokens of a batch."""
    response = ids[:, -length:]
    blocks = isinstance(model, LLaDAModelLM)
    hidden, trained = draw_masks(response, tokenizer.eos_token_id, generator, blocks=blocks)
    noisy = ids.clone()
    noisy[:, -length:][hidden] = tokenizer.mask_token_id
    # On CPUs the unfused attention's backward is several times faster than the flash kernel's at these lengths.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        logits = adapter_for(model).denoiser(model)(noisy, keep)[:, -length:]
    loss = F.cross_entropy(logits.float().flatten(0, 1), response.flatten(), reduction="none")
    return (loss * trained.flatten()).sum() / trained.sum()


def learning_rate_factor(step: int, steps: int, warmup: int = 200, decay: float = 0.5) -> float:
    """Warm-up, plateau, then linear decay to zero over the last `decay` of the run."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (decay * steps)))


def build_model(tokenizer, args: argparse.Namespace) -> PreTrainedModel:
    """Returns a freshly initialised model of the family for the tokenizer."""
    if args.family == "Dream":
        return DreamModel(
            DreamConfig(
                hidden_size=args.width,
                intermediate_size=3 * args.width,
                num_hidden_layers=args.layers,
                num_attention_heads=args.width // 32,
                num_key_value_heads=args.width // 64,
                vocab_size=math.ceil(len(tokenizer) / 32) * 32,
                max_position_embeddings=128,
                rope_theta=10000.0,
                mask_token_id=tokenizer.mask_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                architectures=["DreamModel"],
                sampler_defaults={"steps": 32, "gen_length": 32},
            )
        )
    config = LLaDAConfig(
        d_model=args.width,
        n_layers=args.layers,
        n_heads=args.width // 32,
        mlp_hidden_size=3 * args.width,
        vocab_size=len(tokenizer),
        embedding_size=math.ceil(len(tokenizer) / 32) * 32,
        max_sequence_length=128,
        rope_theta=10000.0,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LLaDAModelLM"],
        sampler_defaults={"steps": 32, "gen_length": 32, "block_length": BLOCK},
    )
    return LLaDAModelLM(config)


def build_optimizers(model: PreTrainedModel, args: argparse.Namespace) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the blocks' matrices, AdamW for embeddings, head and norms; with their peak learning rates."""
    inside = {id(p) for p in adapter_for(model).block_list(model).parameters() if p.ndim == 2}
    matrices = [p for p in model.parameters() if id(p) in inside]
    others = [p for p in model.parameters() if id(p) not in inside]
    muon = torch.optim.Muon(matrices, lr=args.muon_lr, momentum=0.95, weight_decay=0.01)
    adam = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [(muon, args.muon_lr), (adam, args.adam_lr)]


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the checkpoint and training state")
    parser.add_argument("--family", choices=("llada", "Dream"), default="llada", help="model type (default: llada)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, the data stream and the masks")
    parser.add_argument("--steps", type=int, default=10000, help="optimizer steps")
    parser.add_argument("--width", type=int, default=128, help="d_model; heads are 32 wide, the MLP 3x as wide")
    parser.add_argument("--layers", type=int, default=5, help="transformer blocks")
    parser.add_argument("--muon-lr", type=float, default=0.004, help="peak learning rate of the blocks' matrices")
    parser.add_argument("--adam-lr", type=float, default=0.001, help="peak learning rate of everything else")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--stop-after", type=int, default=None, help="stop at this step, keeping the state")
    return parser.parse_args()


def set_learning_rates(optimizers: list[tuple[torch.optim.Optimizer, float]], factor: float) -> None:
    """Sets every optimizer to a fraction of its peak learning rate."""
    for optimizer, peak in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = peak * factor


def main() -> None:
    """Trains, saving the resumable state as it goes, and writes the checkpoint."""
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)

    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args)
    optimizers = build_optimizers(model, args)
    start, seconds, state_file = 0, 0.0, args.output / "training_state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, seconds = state["step"], state["seconds"]
    generator = torch.Generator().manual_seed(1000 * args.seed + start)
    streams = {task: batches(task, tokenizer, 1000 * args.seed + start, generator) for task in BATCHES}
    content = {task: 0.0 for task in BATCHES}
    began = time.perf_counter()
    logger.info("%d parameters, steps %d to %d", sum(p.numel() for p in model.parameters()), start, args.steps)

    def save_state(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers],
            "step": step,
            "seconds": seconds + time.perf_counter() - began,
        }
        torch.save(state, state_file.with_suffix(".partial"))
        state_file.with_suffix(".partial").replace(state_file)

    model.train()
    for step in range(start, args.stop_after or args.steps):
        set_learning_rates(optimizers, learning_rate_factor(step, args.steps))
        for task, stream in streams.items():
            loss = masked_loss(model, *next(stream), tokenizer, generator)
            (loss / len(streams)).backward()
            content[task] = 0.99 * content[task] + 0.01 * float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99:
            rate = (time.perf_counter() - began) / (step + 1 - start)
            losses = " ".join(f"{task} {value:.4f}" for task, value in content.items())
            logger.info("step %d: %s (%.3f s/step)", step + 1, losses, rate)
        if step % 500 == 499:
            save_state(step + 1)

    save_state(args.stop_after or args.steps)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    logger.info("done in %.0f s", seconds + time.perf_counter() - began)


if __name__ == "__main__":
    main()
