"""Ablations: a grid of models, recipes with overrides, and seeds, measured cell by cell and compared in pairs.

The result of every run is one file, named by what it is and keyed by what it depends on, so an interrupted ablation
goes on where it stopped and a changed recipe is measured again. The tables are made of these files alone.
"""

from dllmquant.lab.ablation.document import REFERENCE, Ablation, AblationError
from dllmquant.lab.ablation.plan import AblationPlan, plan_ablation
from dllmquant.lab.ablation.report import planned_text
from dllmquant.lab.ablation.result import RunResult, find_result
from dllmquant.lab.ablation.run import AblationResult, run_ablation
from dllmquant.lab.ablation.summary import Summary, summarize

__all__ = [
    "REFERENCE",
    "Ablation",
    "AblationError",
    "AblationPlan",
    "AblationResult",
    "RunResult",
    "Summary",
    "find_result",
    "plan_ablation",
    "planned_text",
    "run_ablation",
    "summarize",
]
