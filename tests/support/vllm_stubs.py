"""What vLLM-Omni's wheel imports and this environment has not: vLLM above all, and small libraries.

Every name of a package that is not there is a class that takes anything; those whose behaviour counts are written out
below as vLLM has them. As a script: VERSION SCRIPT ARGUMENTS runs another one in such a process.
"""

import contextlib
import dataclasses
import enum
import importlib
import importlib.abc
import importlib.machinery
import json
import logging
import runpy
import sys
import types
import typing
from importlib.util import find_spec
from pathlib import Path

import torch

LIBRARIES = ("cache_dit", "modelscope", "prettytable", "prometheus_client")
ABSENT = {"vllm", *(name for name in LIBRARIES if find_spec(name) is None)}
BETWEEN_STAGES = "vllm_omni.distributed"
"""Transport between stages of a model, which HappyHorse has not, and which is written upon vLLM's."""


class Stub(types.ModuleType):
    __path__: typing.ClassVar[list[str]] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        anything = {
            "__module__": self.__name__,
            "__init__": lambda self, *args, **kwargs: None,
            "__init_subclass__": classmethod(lambda cls, **kwargs: None),
            "__class_getitem__": classmethod(lambda cls, item: cls),
        }
        setattr(self, name, type(name, (), anything))
        return vars(self)[name]


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in ABSENT or fullname.startswith(BETWEEN_STAGES):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module): ...


@dataclasses.dataclass(frozen=True)
class LazyRegisteredModel:
    module_name: str
    class_name: str


@dataclasses.dataclass
class ModelRegistry:
    models: dict[str, LazyRegisteredModel]

    def get_supported_archs(self):
        return self.models.keys()

    def register_model(self, model_arch, model_cls):
        self.models[model_arch] = LazyRegisteredModel(*model_cls.split(":"))

    def _try_load_model_cls(self, model_arch):
        if model_arch not in self.models:
            return None
        found = self.models[model_arch]
        return getattr(importlib.import_module(found.module_name), found.class_name)


def by_name(qualified):
    module, _, name = qualified.rpartition(".")
    return getattr(importlib.import_module(module), name)


def file_to_dict(file_name, model, revision=None):
    path = Path(model) / file_name
    return json.loads(path.read_text()) if path.is_file() else None


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def place(module, **names):
    vars(importlib.import_module(module)).update(names)


def install(version):
    """Stubs for a process of vLLM-Omni of a version."""
    sys.meta_path.insert(0, Finder())
    prompts = {name: typing.TypedDict(name, {}) for name in ("TextPrompt", "TokensPrompt", "EmbedsPrompt")}
    platforms = enum.Enum("PlatformEnum", "UNSPECIFIED CPU CUDA ROCM XPU OOT")
    place("vllm", __version__=version, __version_tuple__=tuple(map(int, version.split("."))))
    place("vllm.envs", VLLM_PLUGINS=None)
    place("vllm.plugins", load_general_plugins=lambda: None)
    place("vllm.logger", init_logger=logging.getLogger)
    place("vllm.inputs", PromptType=dict, **prompts)
    place("vllm.inputs.engine", TokensInput=typing.TypedDict("TokensInput", {}))
    place("vllm.platforms", PlatformEnum=platforms)
    place("vllm.platforms.interface", PlatformEnum=platforms)
    place("vllm.config.utils", config=dataclasses.dataclass)
    place("vllm.utils.network_utils", get_open_port=lambda: 20_000)
    place("vllm.utils.torch_utils", set_default_torch_dtype=default_dtype)
    place("vllm.utils.import_utils", resolve_obj_by_qualname=by_name)
    place("vllm.transformers_utils.config", get_hf_file_to_dict=file_to_dict)
    place("vllm.transformers_utils.repo_utils", get_model_path=lambda model, revision=None: model)
    place("vllm.model_executor.layers.quantization", QUANTIZATION_METHODS=[])
    place("vllm.v1.kv_cache_layout", KVCacheLayout=enum.Enum("KVCacheLayout", "LBNHC BLNHC"))
    place(
        "vllm.model_executor.models.registry",
        _LazyRegisteredModel=LazyRegisteredModel,
        _ModelRegistry=ModelRegistry,
        _VLLM_MODELS={},
    )
    # Its own __init__ patches vLLM.
    root = types.ModuleType("vllm_omni")
    root.__path__ = [str(Path(folder) / "vllm_omni") for folder in sys.path if (Path(folder) / "vllm_omni").is_dir()]
    sys.modules["vllm_omni"] = root
    root.__version__ = importlib.import_module("vllm_omni.version").__version__


if __name__ == "__main__":
    _, version, script, *sys.argv[1:] = sys.argv
    install(version)
    runpy.run_path(script, run_name="__main__")
