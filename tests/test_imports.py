"""Proves: imports are flat and point down only; a script loads what it needs and nothing else; the core needs
nothing beyond its packages; help comes fast because torchvision is loaded only where it is used; what a file
takes of another of ours is there."""
import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"torch", "torchvision", "numpy", "tqdm", "PIL", "scipy"}
OPTIONAL = {"checkpoint": {"safetensors", "onnx", "onnxscript"}, "demo": {"gradio"}}
FLOORS = [  # a module imports from floors below its own, or from those before it on its own
    "distributed model figure toy",
    "run images data losses masking augment formats checkpoint training",
    "clicks scenes prompts knn videos labelmaps classifier",
    "zeroshot davis linseg retrieval probes",
    "monitor pretrain finetune demo report benchmark hubconf",
]
ORDER = [name for floor in FLOORS for name in floor.split()]
OURS = {p.stem for p in ROOT.glob("*.py")}
LAZY = {  # imported inside a function, where a command asks for it
    "probes": {"linseg", "retrieval"},
    "linseg": {"scenes"},
}


def imports(path: Path, lazy: bool = False) -> set[str]:
    """Names of the modules that a file imports: at its top level, or anywhere but in what it does when it is
    started itself."""
    tree = ast.parse(path.read_text())
    started = "if __name__ =="
    tree.body = [part for part in tree.body if not ast.unparse(part).startswith(started)]
    found = set()
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found.add(node.module.split(".")[0])
    return found


def test_every_module_has_its_floor():
    assert OURS <= set(ORDER), sorted(OURS - set(ORDER))


@pytest.mark.parametrize("name", sorted(OURS))
def test_imports_point_down(name):
    found = imports(ROOT / f"{name}.py", lazy=True) & OURS
    above = {other for other in found if ORDER.index(other) >= ORDER.index(name)}
    assert not above, f"{name} imports {sorted(above)}, which stand above it"
    assert "studies" not in imports(ROOT / f"{name}.py", lazy=True)


@pytest.mark.parametrize("name", sorted(OURS))
def test_the_core_needs_its_packages_only(name):
    outside = imports(ROOT / f"{name}.py", lazy=True) - OURS - set(sys.stdlib_module_names)
    assert outside <= PACKAGES | OPTIONAL.get(name, set()), f"{name} imports {sorted(outside)}"


@pytest.mark.parametrize("folder", ["", "studies", "docs/tutorial"])
def test_what_is_taken_of_a_module_is_there(folder):
    """module.name, of our modules that a file imports whole."""
    missing = []
    for path in (ROOT / folder).glob("*.py"):
        tree = ast.parse(path.read_text())
        plain = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
        ours = {alias.name for node in plain for alias in node.names if not alias.asname} & OURS
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
                if not hasattr(importlib.import_module(node.value.id), node.attr):
                    missing.append(f"{path.name}: {node.value.id}.{node.attr}")
    assert not missing


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_pretraining_loads_no_evaluation_that_it_does_not_run():
    loaded = loaded_by("import pretrain")
    assert not loaded & {"linseg", "labelmaps", "retrieval", "davis", "videos", "demo", "finetune",
                         "classifier", "zeroshot", "probes", "benchmark", "torchvision"}
    assert "monitor" in loaded


@pytest.mark.slow
def test_fine_tuning_loads_no_monitor():
    loaded = loaded_by("import finetune")
    assert not loaded & {"monitor", "pretrain", "prompts", "knn", "linseg", "torchvision"}


def test_one_place_for_the_normalisation_constants():
    holders = [p.name for p in ROOT.glob("*.py") if "0.485" in p.read_text() or "0.229" in p.read_text()]
    assert [h for h in holders if h != "davis.py"] == ["images.py"]
