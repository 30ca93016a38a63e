"""The house: its rooms are those of docs/design.md, each imports only from rooms below it, and some never meet jax."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p for p in (ROOT / "hhjax").rglob("*.py") if p.read_text())
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax"}


def documented() -> list[tuple[str, str]]:
    """(room, what it says) of docs/design.md, from top to bottom; a room is `cli.py` or `loops/`."""
    text = (ROOT / "docs" / "design.md").read_text()
    return re.findall(r"^    hhjax/(\S+) +(.+(?:\n {20,}.+)*)", text, re.MULTILINE)


def room(file: Path) -> str:
    """The folder or file just below hhjax/ that `file` is in."""
    first, *rest = file.relative_to(ROOT / "hhjax").parts
    return f"{first}/" if rest else first


def imported(file: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function: `from a.b import c` gives a.b and a.b.c."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(file: Path) -> set[Path]:
    """The files of hhjax that a file imports."""
    paths = (ROOT / f"{name.replace('.', '/')}.py" for name in imported(file))
    return {path for path in paths if path in FILES}


def packages(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(file)}


def test_the_listing_names_every_room_and_file():
    rooms = dict(documented())
    assert list(rooms) == [name for name, _ in documented()] and set(rooms) == {room(f) for f in FILES}
    missing = [f for f in FILES if room(f).endswith("/") and f.name not in rooms[room(f)]]
    assert not missing, f"docs/design.md does not name {missing}"
    named = {name + file for name, text in rooms.items() if name.endswith("/") for file in re.findall(r"\w+\.py", text)}
    assert not [path for path in named if not (ROOT / "hhjax" / path).is_file()]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_imports_only_from_rooms_below(file):
    order = [name for name, _ in documented()]
    above = [f for f in ours(file) if room(f) != room(file) and order.index(room(f)) < order.index(room(file))]
    assert not above, f"{file.relative_to(ROOT)} imports {above}, which docs/design.md lists above it"


def test_files_do_not_import_each_other_in_a_circle():
    try:
        order = list(TopologicalSorter({file: ours(file) for file in FILES}).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {[str(f.relative_to(ROOT)) for f in error.args[1]]}")
    assert set(order) == set(FILES)


def test_only_the_transformer_imports_flax():
    assert [str(f.relative_to(ROOT)) for f in FILES if "flax" in packages(f)] == ["hhjax/model/transformer.py"]


def test_experiments_never_import_loops():
    files = list((ROOT / "experiments").glob("*.py"))
    assert len(files) >= 4 and not [f for f in files if any(n.startswith("hhjax.loops") for n in imported(f))]


@pytest.mark.parametrize("folder", ["scripts", "hhjax/analysis"])
def test_what_redraws_figures_names_no_jax(folder):
    files = list((ROOT / folder).glob("*.py"))
    assert len(files) >= 5 and not [f for f in files if packages(f) & HEAVY]


def test_what_redraws_figures_brings_no_jax_along():
    """Nor through what it imports: read in a process of its own, all at once."""
    plots = [f.stem for f in (ROOT / "scripts").glob("*.py") if f.stem.startswith(("plot_", "table_"))]
    modules = [*plots, "hhjax.io.metrics", "hhjax.io.rundir", "hhjax.analysis.figures", "hhjax.analysis.plotting"]
    code = f"import sys, {', '.join(modules)}; print(sorted({HEAVY} & set(sys.modules)))"
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
