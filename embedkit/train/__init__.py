"""Photos and a recipe become a trained network in a run folder, to be read again and resumed."""

from embedkit.train.examine import examine
from embedkit.train.plan import Plan, choose_device, make_plan
from embedkit.train.recipe import Recipe
from embedkit.train.robust_labels import NOISES
from embedkit.train.run import Run, latest_run, new_run_dir
from embedkit.train.story import Reporter, Silent, describe
from embedkit.train.teacher import Teacher
from embedkit.train.trainer import train

__all__ = [
    "NOISES",
    "Plan",
    "Recipe",
    "Reporter",
    "Run",
    "Silent",
    "Teacher",
    "choose_device",
    "describe",
    "examine",
    "latest_run",
    "make_plan",
    "new_run_dir",
    "train",
]
