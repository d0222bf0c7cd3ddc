"""Long-context tasks as text: RULER's thirteen, needles by depth, scores and their statistics.

Pure: text in, text out.  A tokenizer comes as a function that counts tokens.
"""

from ringstar.evaluation.haystacks import Essay, default_essay, essay_of
from ringstar.evaluation.invented import invented_questions
from ringstar.evaluation.material import Material
from ringstar.evaluation.packages import check_packages
from ringstar.evaluation.questions import FORM as QUESTIONS_FORM
from ringstar.evaluation.questions import QuestionSet, read_questions
from ringstar.evaluation.samples import CountTokens, Prompt, Sample
from ringstar.evaluation.scoring import score
from ringstar.evaluation.sizing import TooShort
from ringstar.evaluation.statistics import CONFIDENCE, paired_p, retention, wilson
from ringstar.evaluation.tasks import (
    BY_DEPTH,
    RULER,
    TASKS,
    NoSample,
    Task,
    even_depths,
    make_sample,
)

__all__ = [
    "BY_DEPTH",
    "CONFIDENCE",
    "QUESTIONS_FORM",
    "RULER",
    "TASKS",
    "CountTokens",
    "Essay",
    "Material",
    "NoSample",
    "Prompt",
    "QuestionSet",
    "Sample",
    "Task",
    "TooShort",
    "check_packages",
    "default_essay",
    "essay_of",
    "even_depths",
    "invented_questions",
    "make_sample",
    "paired_p",
    "read_questions",
    "retention",
    "score",
    "wilson",
]
