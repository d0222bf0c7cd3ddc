"""The perplexity of a long text by position, as a picture."""

from __future__ import annotations

import io

from ringstar.scores import Score


def draw(name: str, score: Score, pieces: int) -> bytes:
    """PNG: that of each piece, and of all tokens up to its end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axis = pyplot.subplots(figsize=(7.0, 4.0), layout="constrained")
    ends, values = zip(*score.perplexities(pieces), strict=True)
    so_far = score.logprobs.double().cumsum(0)[[end - 1 for end in ends]]
    whole = [float((-total / end).exp()) for total, end in zip(so_far, ends, strict=True)]
    axis.stairs(values, (0, *ends), color="#0072B2", label="of each piece", baseline=None)
    axis.plot(ends, whole, color="#000000", label="of everything so far")
    axis.set_yscale("log")
    for level in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        level(ticker.LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.6)))
    axis.set_xlabel("position in the text, tokens")
    axis.set_ylabel("perplexity")
    axis.set_title(f"{name}: {score.perplexity:.3f} over {len(score.ids):,} tokens")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", which="both", alpha=0.3)
    axis.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    pyplot.close(figure)
    return content.getvalue()
