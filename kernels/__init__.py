"""Triton kernels, one file per operator; installed as ``fastdiff.kernels``."""

_WRONG = (
    f"the folder kernels/ was imported as {__name__!r}: expected 'fastdiff.kernels'; "
    "install the project (pip install -e .) and import fastdiff.kernels"
)

if __name__ == "kernels":
    # Hugging Face's package has this name. Who looks for it with the project's folder on the path comes here instead:
    # transformers does at import, and an error would end it there. So give the real package, or one without contents.
    import importlib.util
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    # A second checkout on the path is told which folders have been passed.
    _passed = [*globals().get("_passed", []), Path(__file__).resolve().parent.parent]
    _spec = PathFinder.find_spec(__name__, [entry for entry in sys.path if Path(entry).resolve() not in _passed])
    if _spec is not None and _spec.loader is not None:
        _module = sys.modules[__name__] = importlib.util.module_from_spec(_spec)
        vars(_module)["_passed"] = _passed
        _spec.loader.exec_module(_module)
    else:
        __version__ = "0"  # below every release, so that whoever needs one passes this by
        __path__ = []

        def __getattr__(name: str) -> object:
            raise AttributeError(f"{name!r} is not here: {_WRONG}")

elif __name__ != "fastdiff.kernels":
    raise ImportError(_WRONG)
