"""lm-eval's model class `dllmquant`: its tasks, measured with our samplers and our likelihood bound.

    lm_eval --model dllmquant --model_args pretrained=DIR --tasks gsm8k

lm-eval looks for no plug-ins; `startup.py` is how its command finds the class all the same. In Python, importing this
package registers it, and `python -m dllmquant.integrations.lm_eval` is the same command without that help.
"""

try:
    from dllmquant.integrations.lm_eval.model import DLLMQuantLM
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "lm_eval":
        raise
    raise ModuleNotFoundError("lm-eval is not installed; run: pip install 'dllmquant[eval]'", name="lm_eval") from error

__all__ = ["DLLMQuantLM"]
