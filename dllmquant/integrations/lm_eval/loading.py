"""Models and tokenizers by the arguments lm-eval passes."""

import logging

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.assets import bundled, bundled_names

_LOGGER = logging.getLogger(__name__)


def load(
    pretrained: str | PreTrainedModel,
    tokenizer: str | PreTrainedTokenizerBase | None,
    dtype: str | torch.dtype,
    device: str | None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model, quantized or not, and its tokenizer; what is loaded already is returned as it is.

    Args:
        pretrained: Directory, hub id or name of a bundled model; or a model.
        tokenizer: The same for a tokenizer; None for the model's.
        dtype: Type to load the weights in; "auto" is the checkpoint's own. Not used for a model that is loaded.
        device: Where to load it, as for `usable_device`. Not used for a model that is loaded.
        revision: Branch, tag or commit of a hub id, for the model and the tokenizer of the same id; "main" if None.
        trust_remote_code: Whether Python code that model or tokenizer bring along may be executed.

    Raises:
        ValueError: The checkpoint cannot be read, or a loaded model comes without a tokenizer.
    """
    if isinstance(pretrained, str):
        source = _source(pretrained)
        options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        model: PreTrainedModel = AutoModel.from_pretrained(
            source, dtype=dtype, device_map=usable_device(device), **options
        )
        if tokenizer is None or tokenizer == pretrained:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    else:
        model = pretrained
    if tokenizer is None:
        raise ValueError("tokenizer is None; valid: a tokenizer, or its directory or hub id, beside a loaded model")
    if isinstance(tokenizer, str):
        tokenizer = AutoTokenizer.from_pretrained(_source(tokenizer), trust_remote_code=trust_remote_code)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return model.eval(), tokenizer


def usable_device(name: str | None) -> str:
    """Resolves the name of a device.

    Args:
        name: What torch calls it; None or "auto" for a GPU if there is one, else the CPU. The first GPU, lm-eval's
            default, becomes the CPU where there is no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if name is None or name == "auto":
        return "cuda" if has_gpu else "cpu"
    if name in ("cuda", "cuda:0") and not has_gpu:
        _LOGGER.warning("device %s: there is no GPU; using the CPU", name)
        return "cpu"
    return name


def _source(name: str) -> str:
    return bundled(name) if name in bundled_names() else name
