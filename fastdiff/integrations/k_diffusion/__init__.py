"""k-diffusion's samplers and model wrappers, with its names and signatures and the rows of `fastdiff.samplers`.

`sampling` and `external` stand in for the modules of those names; k-diffusion itself is not needed.
"""
