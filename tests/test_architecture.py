"""The house of DESIGN: imports run one way, and nothing here shadows a package of others."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = (
    ("config_base",),
    ("config",),
    ("files", "command", "progress", "reference", "loopback", "device", "schemas", "served_tensors"),
    ("clip_info",),
    ("contract", "video", "ddim", "kernels", "base", "plots", "upsampling"),
    ("clip_folder",),
    ("attention", "checkpoint", "conditions", "repository", "solvers", "inversion", "blending", "outermost", "reuse"),
    ("unet", "tuning_state", "windows"),
    ("models", "tuning_step"),
    ("memory", "tuning_loop"),
    ("editing", "engines", "metrics"),
    ("tuning", "personalise"),
    ("export", "serving", "client", "sharing", "about"),
    ("demo", "suite", "api"),
    ("app",),
    ("cli",),
)
ROOM = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
FILES = sorted((ROOT / "tav_opt").rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "tav_opt").parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """What a file imports of the package, also inside functions; what is for type checking alone does not count."""
    tree = ast.parse(path.read_text())
    guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = {id(child) for guard in guarded for child in ast.walk(guard)}
    names = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name for name in names if name.startswith("tav_opt.")}


def imported_files(path: Path) -> set[Path]:
    """The files of the package that a file imports: a module, or the package's own where a name stands in it."""
    found = set()
    for name in imported(path):
        parts = ROOT.joinpath(*name.split("."))
        for candidate in (parts, parts.parent):
            files = [file for file in (candidate.with_suffix(".py"), candidate / "__init__.py") if file in FILES]
            if files:
                found.add(files[0])
                break
    return found - {path}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    room = room_of(path)
    if room == "__init__":
        return
    assert room in ROOM, f"{room} stands in no row of the house"
    for other in {name.split(".")[1] for name in imported(path)} - {room, "__version__"}:
        assert ROOM[other] < ROOM[room], f"{path.relative_to(ROOT)} imports {other}, which is not above {room}"


def test_no_files_import_each_other_in_a_circle():
    """Inside a wing too."""
    sorter = graphlib.TopologicalSorter({path: imported_files(path) for path in FILES})
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(str(path.relative_to(ROOT)) for path in error.args[1]))


def test_no_two_files_of_one_name_where_one_would_do():
    """Runtimes and formats are named alike where they are built and where they run, and a command's file is named for
    the command; nothing else is."""
    names = Counter(path.name for path in FILES if room_of(path) != "cli" and not path.name.startswith("__"))
    alike = {name for name, count in names.items() if count > 1}
    assert alike <= {"compiled.py", "tensorrt.py", "sparse_causal.py", "clips.py", "files.py", "graphs.py"}, alike


def test_no_folder_of_the_root_is_importable_as_kernels_or_export():
    """`python -m` puts the root on sys.path; transformers imports the PyPI package `kernels` where there is one."""
    for name in ("kernels", "export"):
        link = ROOT / name  # git writes a link as a file with the target's name where links are not to be had
        assert (str(link.readlink()) if link.is_symlink() else link.read_text()) == f"tav_opt/{name}"
        assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize(
    "module",
    ["tav_opt", "tav_opt.client", "tav_opt.contract", "tav_opt.config", "tav_opt.video", "tav_opt.suite.study_server"],
)
def test_light_rooms_do_not_import_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_worker_does_not_import_the_unet():
    code = "import sys, tav_opt.serving.worker; sys.exit(any(m in sys.modules for m in ('diffusers', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_public_names_are_there():
    import tav_opt

    for name in tav_opt.__all__:
        assert callable(getattr(tav_opt, name)), name
    with pytest.raises(AttributeError):
        _ = tav_opt.nothing_of_that_name
