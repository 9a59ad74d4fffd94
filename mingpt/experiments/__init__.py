"""Experiments: pipelines of stages, studies, predictions, and plans of steps.

``presets`` has the settings of a run; ``pipeline`` trains one thing, leaves one file, and reads it then;
``reproduction`` is the flagship experiment on top of it; ``sweep`` runs studies, grids of methods and settings;
``predictor`` predicts on all processes of a job; ``multistep`` chains prefixes.
"""

from mingpt.experiments.multistep import Plan, Step, plan_from_composition
from mingpt.experiments.pipeline import fine_tune, pretrain, train_prefixes
from mingpt.experiments.predictor import Predictor
from mingpt.experiments.presets import get_default_config, run_folder
from mingpt.experiments.reproduction import reproduce
from mingpt.experiments.sweep import Study, run_study

__all__ = [
    "Plan", "Predictor", "Step", "Study", "fine_tune", "get_default_config", "plan_from_composition",
    "pretrain", "reproduce", "run_folder", "run_study", "train_prefixes",
]  # fmt: skip
