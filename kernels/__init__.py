"""Triton kernels, one file per operator; installed as ``fastdiff.kernels``."""

if __name__ != "fastdiff.kernels":
    raise ImportError(
        f"the folder kernels/ was imported as {__name__!r}: expected 'fastdiff.kernels'; "
        "install the project (pip install -e .) and import fastdiff.kernels"
    )
