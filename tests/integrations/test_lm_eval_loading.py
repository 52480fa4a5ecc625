"""How lm-eval's model class loads: revisions, remote code, and models that are not like LLaDA."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModel

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dllmquant[eval]'")

from lm_eval.api.instance import Instance

from dllmquant.generation import decode_completions, generate_from_ids
from dllmquant.integrations.lm_eval import DLLMQuantLM
from dllmquant.integrations.lm_eval import model as module
from tests.hub import cached_hub, give_remote_code, save_with_length
from tests.tiny import save_tiny, tiny_diffusion_gemma, tiny_llada, tiny_tokenizer

CONTEXTS = ["q: tom has 7 apples. tom buys 5 more. how many remain? a:", "read: tom is in the kitchen."]


@pytest.mark.parametrize(("argument", "revision"), [("", "main"), (",revision=v2", "v2"), (",revision=12", "12")])
def test_model_and_tokenizer_come_from_the_revision(
    argument: str, revision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = {"main": 0, "v2": 1, "12": 2}
    saved = {name: save_with_length(tmp_path / name, 100 + seed, seed=seed) for name, seed in seeds.items()}
    cache = cached_hub(tmp_path / "cache", "org/repo", saved)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for tokenizer in ("", ",tokenizer=org/repo"):
        lm = DLLMQuantLM.create_from_arg_string(f"pretrained=org/repo,dtype=float32{argument}{tokenizer}")
        expected = tiny_llada(seeds[revision]).state_dict()
        assert all(tensor.equal(expected[name]) for name, tensor in lm.model.state_dict().items())
        assert lm.tokenizer.model_max_length == 100 + seeds[revision]


def test_remote_code_runs_only_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "source")
    give_remote_code(source, tmp_path / "modules", monkeypatch)
    for argument in ("", ",trust_remote_code=False"):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            DLLMQuantLM.create_from_arg_string(f"pretrained={source}{argument}")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DLLMQuantLM(tiny_llada(), str(source))
    assert not (source / "ran").exists()
    DLLMQuantLM.create_from_arg_string(f"pretrained={source},trust_remote_code=True")
    (source / "ran").unlink()
    DLLMQuantLM(tiny_llada(), str(source), trust_remote_code=True)


def test_the_model_is_told_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, load = save_tiny(tmp_path / "source"), AutoModel.from_pretrained
    seen: list[dict[str, Any]] = []

    def spy(name: str, **options: Any) -> Any:
        seen.append({key: options[key] for key in ("revision", "trust_remote_code")})
        return load(name, **options)

    monkeypatch.setattr(AutoModel, "from_pretrained", spy)
    DLLMQuantLM(str(source))
    DLLMQuantLM(str(source), revision="v2", trust_remote_code=True)
    told = [{"revision": "main", "trust_remote_code": False}, {"revision": "v2", "trust_remote_code": True}]
    assert seen == told


def test_diffusion_gemma_generates_and_refuses_likelihoods() -> None:
    """Its length is in the configuration of its text model, and it has no mask token."""
    model, tokenizer = tiny_diffusion_gemma(), tiny_tokenizer()
    assert not hasattr(model.config, "max_position_embeddings")
    lm = DLLMQuantLM(model, tokenizer)
    assert lm.max_length == model.config.text_config.max_position_embeddings
    assert DLLMQuantLM(model, tokenizer, max_length=50).max_length == 50
    requests = [
        Instance("generate_until", {}, (text, {"max_gen_toks": 8}), index) for index, text in enumerate(CONTEXTS)
    ]
    expected = []
    for context in CONTEXTS:
        ids = tokenizer(context).input_ids
        generation = generate_from_ids(model, tokenizer, [ids], seed=module._stream(0, context))
        expected += decode_completions(tokenizer, generation)
    assert lm.generate_until(requests, disable_tqdm=True) == expected
    assert all(expected)
    for kind, arguments in (("loglikelihood", (CONTEXTS[0], " 12")), ("loglikelihood_rolling", (CONTEXTS[0],))):
        with pytest.raises(ValueError, match="the family has no mask token"):
            getattr(lm, kind)([Instance(kind, {}, arguments, 0)], disable_tqdm=True)


def test_a_model_without_a_length_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_llada(), tiny_tokenizer()
    monkeypatch.setattr(type(model.config), "get_text_config", lambda _: SimpleNamespace())
    with pytest.raises(ValueError, match=r"max_length is None; valid: .*, because .* has no max_position_embeddings"):
        DLLMQuantLM(model, tokenizer)
    assert DLLMQuantLM(model, tokenizer, max_length=50).max_length == 50
