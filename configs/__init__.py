"""The Hydra tree; one group per replaceable thing, mirroring the code."""
