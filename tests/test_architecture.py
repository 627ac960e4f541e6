"""Imports run one way: from a floor to those below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up; places on one floor may import from each other.
FLOORS = (
    ("utils/errors.py", "utils/exact.py"),
    ("utils/cli", "utils/system", "layers"),
    ("utils/llm", "data_provider", "base_models", "dataset"),
    ("models",),
    ("utils/runs", "utils/memory"),
    ("utils/training",),
    ("run_main.py", "scripts"),
)
FILES = sorted(
    file.relative_to(ROOT).as_posix()
    for floor in FLOORS
    for place in floor
    for file in ((ROOT / place).rglob("*.py") if (ROOT / place).is_dir() else [ROOT / place])
)


def floor_of(name: str) -> int:
    """Return the floor of a file, by its path from the root."""
    (number,) = (
        number
        for number, floor in enumerate(FLOORS)
        if any(name == place or name.startswith(f"{place}/") for place in floor)
    )
    return number


def imports_of(name: str) -> set[str]:
    """Return the files of the project that a file imports."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {module.replace(".", "/") for module in modules}
    files = {path + ending for path in paths for ending in (".py", "/__init__.py")}
    return {file for file in files if (ROOT / file).is_file() and file not in ("utils/__init__.py",)}


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_from_its_floor_and_those_below(name):
    above = [file for file in imports_of(name) if floor_of(file) > floor_of(name)]
    assert not above, f"{name} imports from above: {above}"


def test_the_first_page_and_its_checks_import_no_torch():
    seen, left = set(), {"run_main.py"}
    while left:
        name = left.pop()
        seen.add(name)
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        at_the_top = {node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
        for node in at_the_top:
            module = node.names[0].name if isinstance(node, ast.Import) else node.module
            assert module.split(".")[0] not in ("torch", "transformers", "accelerate", "numpy", "pandas"), name
            file = f"{module.replace('.', '/')}.py"
            left |= {file} - seen if (ROOT / file).is_file() else set()
    assert "utils/cli/options.py" in seen


# Packages that take a second to import and that not every run needs, the project's modules that import these packages,
# and modules of one operating system: only these are imported inside a function.
HEAVY = ("torch", "transformers", "sklearn", "bitsandbytes", "huggingface_hub")
IMPORT_HEAVY = (
    *("utils.training.experiment", "utils.runs.trained", "utils.memory.trial_step", "utils.llm.choice"),
    *("utils.llm.notes", "base_models.make_tiny_llm", "data_provider.reading"),
)
OF_ONE_SYSTEM = ("winreg", "resource")


def test_a_function_imports_only_what_not_every_run_needs():
    inside = {
        node.names[0].name if isinstance(node, ast.Import) else node.module
        for name in FILES
        for function in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    others = {module for module in inside if module.split(".")[0] not in HEAVY} - {*IMPORT_HEAVY, *OF_ONE_SYSTEM}
    assert not others


def test_a_plain_forecaster_needs_none_of_the_heavy_packages(tmp_path):
    argv = ["--demo", "--model", "DLinear", "--max_steps", "2", "--predict", "--checkpoints", str(tmp_path)]
    code = (
        f"import sys, run_main; code = run_main.main({argv!r});"
        f"sys.exit(code or ' '.join({set(HEAVY[1:-1])!r} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (0, "")
