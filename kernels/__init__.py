"""Triton kernels of pylora, reached only through `pylora.dispatch`.

The host functions of an op are in `<op>.py` and `<op>_backward.py`; the other files hold what the
ops share. The folder is installed as `pylora.kernels`. A Python that is started in the repository
root would also find it as the top-level package `kernels`, which would hide the Hugging Face
package of that name from bitsandbytes and transformers. Imported under that name, the folder
therefore stands back: the package installed elsewhere is loaded in its place. Without one, the
folder has neither a file nor a submodule, which transformers and bitsandbytes take for a missing
package.
"""

if __name__ != "pylora.kernels":
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    spec = PathFinder.find_spec(__name__, [p for p in sys.path if Path(p).resolve() != root])
    del __file__
    __path__.clear()
    if spec is not None and spec.loader is not None:
        sys.modules[__name__] = package = module_from_spec(spec)
        spec.loader.exec_module(package)
