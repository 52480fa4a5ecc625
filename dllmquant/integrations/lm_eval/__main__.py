"""lm-eval's command line with the model class `dllmquant` registered."""

from lm_eval.__main__ import cli_evaluate

import dllmquant.integrations.lm_eval  # noqa: F401 - registers the class

if __name__ == "__main__":
    cli_evaluate()
