"""With ``HAPPYHORSE_FAST_SANITIZE=1`` (`make sanitize`) the host module under test is built with sanitizers."""

import importlib.util
import os
import sys
from unittest import mock

from cuda_shim import CSRC, SANITIZERS

import happyhorse_fast
from happyhorse_fast.csrc import native

if os.environ.get("HAPPYHORSE_FAST_SANITIZE") == "1":
    flags = f"-O1 {' '.join(SANITIZERS)} -fno-sanitize-recover=all"
    path = CSRC.parent / ".build" / "sanitized" / "_C.so"
    compiler = {"CXX": os.environ.get("CXX", "g++"), "LDFLAGS": flags, "CXXFLAGS": f"{flags} -D_GLIBCXX_ASSERTIONS"}
    with mock.patch.dict(os.environ, compiler):
        native.build_module(path)
    spec = importlib.util.spec_from_file_location("happyhorse_fast._C", path)
    sys.modules[spec.name] = happyhorse_fast._C = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(happyhorse_fast._C)
