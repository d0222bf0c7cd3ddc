"""A trace of a real run: what every rank computed, sent and waited for, in one file."""

from ringstar.trace.collect import Trace, check_profile, engine_parts, trace_path

__all__ = ["Trace", "check_profile", "engine_parts", "trace_path"]
