"""How much a comparison has to do."""

from __future__ import annotations

from launch.compare_plan import Plan
from launch.progress import TOKENS_OF_A_STEP


def work_of(plan: Plan, new_tokens: int) -> int:
    """In tokens of a document, for all settings."""
    tokens = len(plan.document) + sum(len(haystack.ids) for haystack in plan.haystacks)
    asked = len(plan.questions) + sum(len(haystack.needles) for haystack in plan.haystacks)
    scored = sum(len(question.ids) + new_tokens for question in plan.questions)
    scored += sum(len(passage.ids) for passage in plan.passages)
    one = tokens + asked * TOKENS_OF_A_STEP * new_tokens + scored
    return one * len(plan.settings)
