"""The models that come with the package do what their cards say."""

import pytest
from transformers import AutoModel, AutoTokenizer

import dllmquant
from dllmquant.assets import bundled_names
from dllmquant.lab.evaluate import evaluate


def test_names() -> None:
    assert bundled_names() == ["dream-tiny", "llada-tiny", "llada-tiny-seed1"]
    with pytest.raises(ValueError, match="unknown 'llada-8b'; valid: dream-tiny, llada-tiny, llada-tiny-seed1"):
        dllmquant.bundled("llada-8b")


@pytest.mark.parametrize("name", bundled_names())
def test_they_solve_their_tasks(name: str) -> None:
    path = dllmquant.bundled(name)
    model, tokenizer = AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    evaluation = evaluate(model, tokenizer, ["math", "code"], limit=40, progress=False)
    assert all(score.accuracy >= 0.9 for score in evaluation.scores.values())
