"""A kernel repository from this package: the modules that attention needs, their imports relative, and its metadata.

`kernels` loads several versions of a repository side by side, each under a name of its own. So no module imports
another by the package's name, and torch's ops are in a namespace that the sources' digest is part of.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import re
from pathlib import Path

from happyhorse_fast.files import replacing

PACKAGE = "happyhorse_fast"
NAME = "happyhorse-attention"
MODULE = NAME.replace("-", "_")
VERSION = 0
"""Of the repository's interface; `kernels` keeps 0 for what may still change."""
BACKENDS = ("cuda", "cpu")
"""On a CPU the same calls run in plain torch."""
ROOTS = {f"{PACKAGE}.hosts.hub.api": "__init__", f"{PACKAGE}.hosts.hub.layers": "layers"}
"""Modules that go elsewhere than where they are in the package."""
DATA = {f"{PACKAGE}.kernels": "configs/*.json", f"{PACKAGE}.csrc": "device/*.cu*"}
"""Files beside a package's modules that it reads."""
OP = f"{PACKAGE}::"
_IMPORT = re.compile(rf"^(\s*)from {PACKAGE}(\.[\w.]+)? import ", re.MULTILINE)
_NAMESPACE = re.compile(r'^NAMESPACE = ".*"$', re.MULTILINE)


def build(folder: Path, repo_id: str) -> list[Path]:
    """Write the repository: what `kernel-builder` takes (build.toml, torch-ext/), and what it would make (build/).

    Args:
        folder: Where; new or empty.
        repo_id: Name on the hub, such as ``"somebody/happyhorse-attention"``.

    Returns:
        Every file, relative to ``folder``.

    Raises:
        FileExistsError: ``folder`` has something in it.
        ValueError: ``repo_id`` is not of two parts.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"repo_id must be owner/name, got {repo_id!r}")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} must be new or empty")
    files = sources()
    made = {Path("build.toml"): _toml(repo_id), Path("flake.nix"): _FLAKE.encode(), Path("CARD.md"): _card(repo_id)}
    made |= {Path("torch-ext") / MODULE / path: content for path, content in files.items()}
    for backend in BACKENDS:
        variant = Path("build") / f"torch-{backend}"
        made |= {variant / path: content for path, content in files.items()}
        made[variant / "metadata.json"] = _metadata(backend, files)
    for path, content in made.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder / path) as partial:
            partial.write_bytes(content)
    return sorted(made)


def sources() -> dict[Path, bytes]:
    """The repository's module: path within it -> content."""
    texts = {module: Path(file).read_text() for module, file in _closure(list(ROOTS)).items()}
    digest = hashlib.sha256("".join(texts[module] for module in sorted(texts)).encode()).hexdigest()[:12]
    files = {}
    for module, text in texts.items():
        path = _path(module)
        files[path] = _rewritten(text, path, f"{MODULE}_{digest}").encode()
    for package, pattern in DATA.items():
        there = Path(_origin(package)).parent
        files |= {_path(package).parent / file.relative_to(there): file.read_bytes() for file in there.glob(pattern)}
    return files


def _closure(roots: list[str]) -> dict[str, str]:
    """Module -> file, of all that ``roots`` import from the package, wherever in the file, and their packages."""
    found: dict[str, str] = {}
    ahead = list(roots)
    while ahead:
        module = ahead.pop()
        if module in found or module == PACKAGE:
            continue
        found[module] = _origin(module)
        if module not in ROOTS:
            ahead.append(module.rpartition(".")[0])
        for node in ast.walk(ast.parse(Path(found[module]).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
                base = str(node.module)
                names = [f"{base}.{alias.name}" for alias in node.names]
                ahead += [name if _is_module(name) else base for name in names]
    return found


def _is_module(name: str) -> bool:
    parent, _, last = name.rpartition(".")
    folder = Path(_origin(parent)).parent
    return Path(_origin(parent)).name == "__init__.py" and any(
        (folder / there).exists() for there in (f"{last}.py", f"{last}/__init__.py")
    )


def _origin(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{module} is not where this package has it")
    return spec.origin


def _path(module: str) -> Path:
    """Where a module of the package goes."""
    if module in ROOTS:
        return Path(f"{ROOTS[module]}.py")
    path = Path(*module.split(".")[1:])
    return path / "__init__.py" if Path(_origin(module)).name == "__init__.py" else path.with_suffix(".py")


def _rewritten(text: str, path: Path, namespace: str) -> str:
    """A module's text with relative imports and torch's ops in ``namespace``."""

    def relative(match: re.Match[str]) -> str:
        indent, module = match[1], (match[2] or "")[1:]
        there = f"{PACKAGE}.{module}"
        if f"{PACKAGE}.hosts.hub" in (there, there.rpartition(".")[0]):
            module = ""  # `api` and `layers` are at the top
        return f"{indent}from .{'.' * len(path.parent.parts)}{module} import "

    return _NAMESPACE.sub(f'NAMESPACE = "{namespace}"', _IMPORT.sub(relative, text).replace(OP, f"{namespace}::"))


def _metadata(backend: str, files: dict[Path, bytes]) -> bytes:
    digests = {
        str(path): base64.b64encode(hashlib.sha256(content).digest()).decode() for path, content in files.items()
    }
    every = hashlib.sha256("".join(digests[path] for path in sorted(digests)).encode()).hexdigest()[:12]
    found = {
        "name": NAME,
        "id": f"_{MODULE}_{backend}_{every}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": dict(sorted(digests.items()))},
    }
    return json.dumps(found, indent=1).encode()


def _toml(repo_id: str) -> bytes:
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    return f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = [{backends}]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
pyext = ["py", "json", "cu", "cuh"]
""".encode()


def _card(repo_id: str) -> bytes:
    return f"""---
library_name: kernels
license: apache-2.0
---
Attention of bf16 tensors with heads of 32, 64 or 128 channels, dense or by a block map, from the Triton part of
happyhorse_fast. Without gradients, masks, dropout and causality, which it refuses by name.

```python
from kernels import get_kernel

kernel = get_kernel("{repo_id}", version={VERSION}, trust_remote_code=True)
out = kernel.attention(q, k, v)  # [B, Hq, N, D], [B, Hkv, M, D]
```
""".encode()


_FLAKE = """{
  description = "Attention of happyhorse_fast";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""
