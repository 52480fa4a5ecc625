"""Loading exports as their readers do: in a process of its own in which nothing can import dllmquant."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PROGRAM = """
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dllmquant":
            raise ImportError(f"{name} is not to be imported here")

sys.meta_path.insert(0, Forbidden())

import torch
from torch import nn
from transformers import AutoModel

torch.set_num_threads(1)
ids, directories = torch.load(sys.argv[1])
results = {}
for name, directory in directories.items():
    model = AutoModel.from_pretrained(directory, trust_remote_code=True, local_files_only=True).eval()
    with torch.no_grad():
        logits = model(ids).logits
    linears = {path: part.weight.detach() for path, part in model.named_modules() if isinstance(part, nn.Linear)}
    results[name] = (type(model).__module__, logits, linears)
assert not any(name.partition(".")[0] == "dllmquant" for name in sys.modules)
torch.save(results, sys.argv[2])
"""


@dataclass(frozen=True)
class Loaded:
    """What a reader has: the module its model class is from, logits, and weights of linear layers after a forward."""

    module: str
    logits: Tensor
    weights: dict[str, Tensor]


def environment(scratch: Path) -> dict[str, str]:
    """Variables of a process that keeps the remote code it copies in `scratch`."""
    return os.environ | {"HF_MODULES_CACHE": str(scratch / "modules")}


def load_fresh(directories: dict[str, Path], ids: Tensor, scratch: Path) -> dict[str, Loaded]:
    """Loads exports by transformers alone, runs them on ids, and returns what came of each."""
    given, results = scratch / "given.pt", scratch / "results.pt"
    torch.save((ids, {name: str(path) for name, path in directories.items()}), given)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(given), str(results)],
        check=False,
        capture_output=True,
        text=True,
        cwd=scratch,
        env=environment(scratch),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: Loaded(*result) for name, result in torch.load(results).items()}
