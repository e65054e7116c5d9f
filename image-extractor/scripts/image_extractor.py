#!/usr/bin/env python
"""The command `image_extractor.py`: extract images from simtel files (see `image_extractor.py
--help`).

Python puts the folder of a script first on the module path. This file has the name of the package,
so that other commands in the same folder (pytest, ipython) that import image_extractor would find
this file instead. If imported, it therefore loads the package in its place.
"""

import importlib.util
import sys
from pathlib import Path


def _package_spec():
    """Find the installed package, leaving out the folder of this script."""
    here = Path(__file__).resolve().parent
    everywhere = list(sys.path)
    sys.path[:] = [p for p in everywhere if Path(p or ".").resolve() != here]
    try:
        for finder in sys.meta_path:
            spec = finder.find_spec("image_extractor", None)
            if spec is not None and spec.submodule_search_locations is not None:
                return spec
    finally:
        sys.path[:] = everywhere
    raise ImportError(
        "the package image_extractor is not installed. Run: pip install ./image-extractor"
    )


_spec = _package_spec()
_package = importlib.util.module_from_spec(_spec)
sys.modules["image_extractor"] = _package
_spec.loader.exec_module(_package)

if __name__ == "__main__":
    from image_extractor.cli import main

    sys.exit(main())
