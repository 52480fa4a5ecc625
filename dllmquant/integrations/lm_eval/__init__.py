"""lm-eval's model class `dllmquant`: its tasks, measured with our samplers and our likelihood bound.

    python -m dllmquant.integrations.lm_eval --model dllmquant --model_args pretrained=DIR --tasks gsm8k

lm-eval looks for no plug-ins: `lm_eval --model dllmquant` does not know the class. The module above is lm-eval's own
command line with the class registered. In Python, importing this package registers it.
"""

try:
    from dllmquant.integrations.lm_eval.model import DLLMQuantLM
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "lm_eval":
        raise
    raise ModuleNotFoundError("lm-eval is not installed; run: pip install 'dllmquant[eval]'", name="lm_eval") from error

__all__ = ["DLLMQuantLM"]
