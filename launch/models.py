"""Show which model families run exactly here, by running a small random model of each.

    python -m launch.models                  # all of them: about a minute
    python -m launch.models llama gemma2
    python -m launch.models --write          # a developer: the list and the table of the docs

A small model of every supported family, with what is particular to it, goes through a ring of
simulated ranks, in chunks, and is compared with one device's eager Hugging Face model in float64:
the first token's logits, relative to their norm, and the greedy tokens.  Star Attention is
approximate by design; in one block, which leaves nothing out, it is held to the same bound.
Star has none where a window is shorter than the text.

Status: 0 all are exact, 1 some are not.
"""

from __future__ import annotations

from launch.interrupts import quiet_interrupts

if __name__ == "__main__":  # the imports below take seconds
    quiet_interrupts()

import argparse
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from launch.faults import Reporter, exit_status
from launch.start import run_program
from ringstar.config import CacheConfig, RingConfig, StarConfig, StrategyConfig
from ringstar.models import SUPPORTED, TINY, features, quiet_transformers, save_tiny
from ringstar.models.one_device import OneDevice
from ringstar.runtime import LongContext

DOCS = Path(__file__).parent.parent / "docs" / "models.md"
BOUND = 1e-5
WORLD, CHUNK_TOKENS, CONTEXT, QUERY, NEW = 3, 11, 101, 7, 16


@dataclass(frozen=True)
class Verdict:
    """Relative errors of the first logits against float64, and whether greedy tokens are equal.

    `own` is the error of Hugging Face's own float32; star is None where there is none.
    """

    family: str
    model_class: str
    features: str
    own: float
    ring: float
    star: float | None
    same_tokens: bool

    @property
    def exact(self) -> bool:
        errors = [self.ring] if self.star is None else [self.ring, self.star]
        return self.same_tokens and max(errors) <= max(BOUND, 20 * self.own)


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(argv)
    reporter = Reporter()
    reporter.show_traceback = True  # for developers
    return exit_status(lambda: _judge_all(parser, given), reporter)


def _judge_all(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    if given.write and given.family:
        parser.error("--write takes all families: name none")
    quiet_transformers()
    logging.getLogger("ringstar").setLevel(logging.WARNING)
    families = given.family or sorted(TINY)
    verdicts = list(tqdm(map(_judge, families), total=len(families), unit="family"))
    Console().print(_table(verdicts))
    if given.write:
        _write(verdicts)
    return 0 if all(verdict.exact for verdict in verdicts) else 1


def _judge(family: str) -> Verdict:
    try:
        return judge(family)
    except Exception as error:
        error.add_note(f"family {family}")
        raise


@torch.inference_mode()
def judge(family: str) -> Verdict:
    """Run a small model of `family`, on one device and on simulated ranks."""
    with tempfile.TemporaryDirectory(prefix="ringstar-models-") as folder:
        save_tiny(family, Path(folder))
        runtime = LongContext.from_pretrained(
            folder,
            transport="threads",
            world_size=WORLD,
            chunk_tokens=CHUNK_TOKENS,
            threads_per_rank=1,
            cache=CacheConfig(reuse=False),
        )
        plain, double = (
            OneDevice(runtime.files, dtype, torch.device("cpu"), "eager")
            for dtype in (torch.float32, torch.float64)
        )
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, runtime.files.vocab_size, (CONTEXT + QUERY,), generator=generator)
        context, query = ids[:CONTEXT].tolist(), ids[CONTEXT:].tolist()
        for model in (plain, double):
            model.encode(context)
        want, exact = plain.ask(query, NEW), double.ask(query, 1).first_logits.double()
        errors, same = {}, True
        for strategy in _strategies(runtime):
            document = runtime.encode(context, strategy=strategy, length=CONTEXT + QUERY)
            answer = runtime.ask(document, query, max_new_tokens=NEW)
            errors[strategy.name] = _relative(answer.first_logits, exact)
            same = same and answer.ids == want.ids
        own = _relative(want.first_logits, exact)
        what = ", ".join(features(runtime.files.config))
        (named,) = runtime.files.config.architectures
        return Verdict(family, named, what, own, errors["ring"], errors.get("star"), same)


def _strategies(runtime: LongContext) -> Iterator[StrategyConfig]:
    yield RingConfig()
    if runtime.files.window is None:
        yield StarConfig(block_size=CONTEXT)


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double().cpu() - want).norm() / want.norm())


HEADINGS = ("family", "features", "ring", "star, one block", "Hugging Face float32", "verdict")


def _cells(verdict: Verdict) -> tuple[str, ...]:
    star = "no" if verdict.star is None else f"{verdict.star:.1e}"
    said = "exact" if verdict.exact else "differs"
    return verdict.family, verdict.features, f"{verdict.ring:.1e}", star, f"{verdict.own:.1e}", said


def _table(verdicts: list[Verdict]) -> Table:
    table = Table(*HEADINGS)
    for verdict in verdicts:
        table.add_row(*_cells(verdict), style=None if verdict.exact else "red")
    return table


def markdown(verdicts: list[Verdict]) -> str:
    """The page of the docs."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *map(_cells, verdicts)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""# Models

Written by `python -m launch.models --write`: a small random model of each family (two layers,
weights of std 0.2, float32), {CONTEXT} tokens on {WORLD} simulated ranks in chunks of
{CHUNK_TOKENS} a rank, a question of {QUERY}, {NEW} greedy tokens. Errors are those of the first
token's logits against Hugging Face's eager attention in float64, relative to their norm; exact
means at most 1e-5, or 20 times the error of Hugging Face's own float32, and that all greedy tokens
are equal. Star is approximate by design: one block, which leaves nothing out, shows that it
computes what it should; there is none where a window is shorter than the text.

{table}
"""


def _write(verdicts: list[Verdict]) -> None:
    """What the loader accepts is what was exact."""
    classes = {verdict.family: verdict.model_class for verdict in verdicts if verdict.exact}
    SUPPORTED.write_text(json.dumps(classes, indent=1) + "\n")
    DOCS.write_text(markdown(verdicts))
    print(f"written: {SUPPORTED.name}, {DOCS.name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.models",
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("family", nargs="*", choices=[[], *sorted(TINY)], help="default: all")
    parser.add_argument("--write", action="store_true", help="rewrite the list and docs/models.md")
    return parser


if __name__ == "__main__":
    run_program(main)
