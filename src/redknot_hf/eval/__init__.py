"""Quality measured: tasks, baselines at equal bytes, intervals. `redknot eval` is the command line of it."""

from .documents import read_questions, read_texts
from .methods import METHODS, build_methods
from .run import Evaluation, evaluate
from .tasks import DEFAULT_TASKS, TASKS

__all__ = [
    "DEFAULT_TASKS",
    "METHODS",
    "TASKS",
    "Evaluation",
    "build_methods",
    "evaluate",
    "read_questions",
    "read_texts",
]
