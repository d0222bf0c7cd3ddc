"""One run on one NVIDIA GPU: kernels as shares of the card's two ceilings, in minutes.

Read in this order: timing.py (how), ceilings.py, encode.py, decode.py, merging.py, ring.py,
model.py (what), report.py (where it goes), __main__.py.
"""
