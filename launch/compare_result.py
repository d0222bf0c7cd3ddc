"""What a comparison found, as figures and as JSON; `docs/compare.md` describes each field."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from launch.compare_measure import Divergence, Finding, Measured
from launch.compare_needles import Haystack
from launch.compare_plan import Plan
from launch.result_fields import runtime_fields
from ringstar.answers import Answer
from ringstar.runtime import LongContext
from ringstar.strategies import blocks_of


@dataclass(frozen=True, slots=True)
class Summary:
    """One setting in one line; None where there is nothing to hold against exact, or no probe.

    `encode_ratio` is to exact's time; KL divergences are KL(exact ‖ setting) in nats; shares
    and `quoted` are from 0 to 1.
    """

    label: str
    encode_s: float
    encode_ratio: float
    kv_bytes: int
    bytes_sent: int
    first_kl_mean: float | None
    first_kl_max: float | None
    answer_kl_mean: float | None
    answer_same_top: float | None
    same_answers: int | None
    passage_kl_mean: float | None
    passage_same_top: float | None
    quoted: float | None
    needles_found: int | None


def summarize(seen: Measured, exact: Measured) -> Summary:
    """The figures of one setting, beside exact's."""
    answers, passages = seen.of_answers, seen.of_passages
    first = [of.kl[0] for of in answers]
    pairs = zip(seen.answers, exact.answers, strict=True)
    return Summary(
        label=seen.setting.label,
        encode_s=seen.encode_s,
        encode_ratio=seen.encode_s / exact.encode_s,
        kv_bytes=max(seen.kv_bytes),
        bytes_sent=max(seen.bytes_sent),
        first_kl_mean=mean(first),
        first_kl_max=max(first, default=None),
        answer_kl_mean=mean(every_kl(answers)),
        answer_same_top=mean(every_top(answers)),
        same_answers=sum(mine.ids == its.ids for mine, its in pairs) if answers else None,
        passage_kl_mean=mean(every_kl(passages)),
        passage_same_top=mean(every_top(passages)),
        quoted=mean(seen.quoted),
        needles_found=sum(f.found for f in chain(*seen.trials)) if seen.trials else None,
    )


def mean(values: Iterable[float]) -> float | None:
    """None of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def every_kl(found: Sequence[Divergence]) -> list[float]:
    return [value for of in found for value in of.kl]


def every_top(found: Sequence[Divergence]) -> list[bool]:
    return [value for of in found for value in of.same_top]


def recall_by_depth(seen: Measured) -> list[float]:
    """The share of trials that found the needle, at each depth from the first to the last."""
    return [sum(f.found for f in column) / len(column) for column in zip(*seen.trials, strict=True)]


def result_of(runtime: LongContext, plan: Plan, found: Sequence[Measured]) -> dict[str, Any]:
    """The result JSON."""
    world, exact = runtime.world_size, found[0]
    return {
        "document_tokens": len(plan.document),
        **runtime_fields(runtime),
        "encodes": plan.encodes,
        "questions": [{"text": q.text, "query_tokens": len(q.ids)} for q in plan.questions],
        "passages": [
            {"start": p.start, "depth": p.depth, "tokens": len(p.ids)} for p in plan.passages
        ],
        "haystacks": [_haystack(haystack) for haystack in plan.haystacks],
        "settings": [_setting(seen, exact, len(plan.document), world) for seen in found],
    }


def _haystack(haystack: Haystack) -> dict[str, Any]:
    needles = [
        {
            "depth": needle.depth,
            "at": needle.at,
            "sentence": needle.fact.sentence,
            "question": needle.fact.question,
            "expected": needle.fact.expected,
        }
        for needle in haystack.needles
    ]
    return {"tokens": len(haystack.ids), "needles": needles}


def _setting(seen: Measured, exact: Measured, tokens: int, world: int) -> dict[str, Any]:
    strategy = seen.setting.strategy
    blocks = blocks_of(strategy, tokens, world)
    held: Sequence[Divergence | None] = seen.of_answers or [None] * len(seen.answers)
    quotes: Sequence[Divergence | None] = seen.of_passages or [None] * len(seen.quoted)
    answers = zip(seen.answers, exact.answers, held, strict=True)
    return {
        "summary": asdict(summarize(seen, exact)),
        "given": seen.setting.given,
        "strategy": asdict(strategy),
        "blocks": blocks.count if blocks else None,
        "block_size": blocks.size if blocks else None,
        "anchor_size": blocks.anchor if blocks else None,
        "kv_bytes": seen.kv_bytes,
        "bytes_sent": seen.bytes_sent,
        "answers": [_answer(*of) for of in answers],
        "passages": [
            {"quoted": quoted, **_divergence(of)}
            for quoted, of in zip(seen.quoted, quotes, strict=True)
        ],
        "trials": [
            {"encode_s": encode_s, "needles": [_finding(f) for f in findings]}
            for encode_s, findings in zip(seen.trial_encode_s, seen.trials, strict=True)
        ],
    }


def _answer(answer: Answer, exact: Answer, of: Divergence | None) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "answer_ids": answer.ids,
        "finish_reason": answer.finish_reason,
        "ttft_s": answer.ttft_s,
        "tpot_s": answer.tpot_s,
        "same_as_exact": answer.ids == exact.ids,
        **_divergence(of),
    }


def _divergence(of: Divergence | None) -> dict[str, Any]:
    return {"kl": of.kl if of else None, "same_top": of.same_top if of else None}


def _finding(finding: Finding) -> dict[str, Any]:
    return {"answer": finding.answer, "found": finding.found}
