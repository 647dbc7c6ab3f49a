"""Proves: imports are flat and go one way, the core needs nothing beyond its packages, and nothing foreign
crept in."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = {p.stem for p in ROOT.glob("*.py")}
PACKAGES = {"torch", "torchvision", "numpy", "tqdm", "PIL", "scipy"}
OPTIONAL = {"checkpoint": {"safetensors"}, "bench": {"timm"}, "demo": {"gradio"}}
ALLOWED = {
    "distributed": set(), "model": set(), "toy": set(), "figure": set(),
    "data": {"distributed", "toy"}, "losses": {"distributed"}, "masking": {"data", "model"},
    "checkpoint": {"model", "distributed"}, "coco": {"data", "toy"},
    "features": {"data", "checkpoint", "model"},
    "zeroshot": {"data", "checkpoint", "coco", "distributed", "features", "figure", "model"},
    "linseg": {"data", "checkpoint", "distributed", "figure", "model"},
    "retrieval": {"data", "checkpoint", "distributed", "figure", "model"},
    "probes": {"data", "checkpoint", "coco", "distributed", "features", "figure", "linseg", "masking",
               "model", "retrieval", "zeroshot"},
    "davis": {"data", "checkpoint", "distributed", "model"},
    "augment": set(),
    "finetune": {"augment", "data", "checkpoint", "distributed", "features", "figure", "masking", "model",
                 "monitor"},
    "monitor": {"data", "distributed", "features", "figure", "masking", "model", "probes", "zeroshot"},
    "pretrain": {"data", "losses", "masking", "checkpoint", "model", "distributed", "monitor"},
    "demo": {"zeroshot", "toy", "checkpoint", "data", "distributed", "figure"},
    "ablation": {"distributed", "figure", "monitor"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found.add(node.module.split(".")[0])
    return found


def test_import_graph():
    for name in OURS - {"bench"}:  # bench imports what it times
        found = imports(ROOT / f"{name}.py")
        assert found & OURS <= ALLOWED[name], f"{name} imports {sorted(found & OURS - ALLOWED[name])}"
        outside = found - OURS - set(sys.stdlib_module_names)
        assert outside <= PACKAGES | OPTIONAL.get(name, set()), f"{name} imports {sorted(outside)}"


def test_no_circle():
    order, left = [], {n: imports(ROOT / f"{n}.py") & OURS for n in OURS}
    while left:
        free = [n for n, needs in left.items() if needs <= set(order)]
        assert free, f"circle among {sorted(left)}"
        order += free
        left = {n: needs for n, needs in left.items() if n not in free}


def test_one_place_for_the_normalisation_constants():
    holders = [p.name for p in ROOT.glob("*.py") if re.search(r"0\.485|0\.229", p.read_text())]
    assert [h for h in holders if h != "davis.py"] == ["data.py"]
