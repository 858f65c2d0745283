"""The house rules that a program can check: floors, names, state, imports, the wheel."""

import ast
import inspect
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer.main

import hairpin
from hairpin.cli.app import app

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "hairpin"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = {
    ".".join(("hairpin", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(SOURCE.rglob("*.py"))
}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


# ---------------------------------------------------------------------------------------- floors


def floors() -> dict[str, tuple[int, int]]:
    """(floor, room) of each part of the package, read from the table in docs/architecture.md."""
    text = (ROOT / "docs/architecture.md").read_text()
    block = re.search(r"```text title=\"floors\"\n(.*?)```", text, re.DOTALL)
    assert block is not None, "docs/architecture.md has lost its table of floors"
    found: dict[str, tuple[int, int]] = {}
    for line in block[1].splitlines():
        floor, rooms = re.match(r"(\d+)\s+(.*)", line).groups()
        for room, parts in enumerate(re.split(r"\s{2,}", rooms.strip())):
            found |= {part: (int(floor), room) for part in parts.split(", ")}
    return found


def imports(module: str) -> Iterator[str]:
    """Every module of ours that ``module`` imports, anywhere in its text."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import; write it whole"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in MODULES:
                    yield whole
                elif node.module in MODULES:
                    yield node.module


def test_each_part_of_the_package_has_a_floor():
    parts = {module.split(".")[1] for module in MODULES if module != "hairpin"}
    assert parts <= set(floors()), "add the new part to the floors in docs/architecture.md"


@pytest.mark.parametrize("module", [m for m in MODULES if m != "hairpin"])
def test_a_module_imports_only_lower_floors(module):
    """Own room and lower floors; the public face ``hairpin`` lies above all that it shows."""
    table = floors()
    own = table[module.split(".")[1]]
    face = max(table[home.split(".")[1]][0] for home in hairpin._HOMES.values())
    for imported in imports(module):
        if imported == "hairpin":
            assert own[0] > face, f"{module} imports the public face, which shows floor {face}"
            continue
        theirs = table[imported.split(".")[1]]
        assert theirs[0] < own[0] or theirs == own, (
            f"{module} on floor {own[0]} imports {imported} on floor {theirs[0]}"
        )


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("hairpin.models.")])
def test_models_are_plain(module):
    """A model knows nothing of ranks: no comm, no planning, no torch.distributed."""
    foreign = {"hairpin", "hairpin.comm", "hairpin.graph", "hairpin.planning", "hairpin.run"}
    for imported in imports(module):
        assert imported not in foreign, f"{module} imports {imported}"
        assert ".".join(imported.split(".")[:2]) not in foreign, f"{module} imports {imported}"
    assert "torch.distributed" not in MODULES[module].read_text()


@pytest.mark.parametrize(
    "module", [m for m in MODULES if m.startswith("hairpin.planning.") and m.count(".") > 2]
)
def test_folders_of_planning_do_not_see_each_other(module):
    """What joins two of them lies beside them."""
    folder = module.split(".")[2]
    for imported in imports(module):
        _, room, *path = imported.split(".")
        other = room == "planning" and len(path) > 1 and path[0] != folder
        assert not other, f"{module} imports {imported}"


def test_modules_import_one_another_without_cycles():
    """Take away modules that import nothing left, or that nothing left imports: none may stay."""
    left = {module: set(imports(module)) - {module} for module in MODULES if module != "hairpin"}
    while True:
        imported = set().union(*left.values()) if left else set()
        inner = {m: needs & left.keys() for m, needs in left.items() if m in imported}
        inner = {m: needs for m, needs in inner.items() if needs}
        if inner == left:
            break
        left = inner
    assert not left, f"a cycle: {left}"


# ----------------------------------------------------------------------------------------- state

_MUTABLE_CALLS = {"list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict"}
_MUTATORS = {
    "add", "append", "clear", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"
}  # fmt: skip


def module_containers(module: str) -> dict[str, int]:
    """Lists, dicts and sets bound at the top of a module, with their lines."""
    found = {}
    for node in tree(module).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        value = node.value
        name = value.func if isinstance(value, ast.Call) else None
        made = isinstance(name, ast.Name) and name.id in _MUTABLE_CALLS
        if made or isinstance(
            value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
        ):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found[target.id] = node.lineno
    return found


def changed_names(module: str) -> set[str]:
    """Names of which an item is set or deleted, or a changing method called."""
    nodes = list(ast.walk(tree(module)))
    items = [
        node.value
        for node in nodes
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
    ]
    methods = [
        node.value for node in nodes if isinstance(node, ast.Attribute) and node.attr in _MUTATORS
    ]
    return {value.id for value in items + methods if isinstance(value, ast.Name)}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_keeps_state(module):
    changed = changed_names(module)
    for name, line in module_containers(module).items():
        assert name.startswith("__") or name.isupper(), (
            f"{MODULES[module]}:{line}: {name} is a container at module level; if it never "
            "changes, write it in capitals"
        )
        assert name not in changed, f"{MODULES[module]}:{line}: {name} is changed at run time"
    globals_ = [n for n in ast.walk(tree(module)) if isinstance(n, ast.Global)]
    assert not globals_, f"{module} has a global statement"


# ----------------------------------------------------------------------------------------- names

_POOR_NAMES = re.compile(r"manager|engine|helper|utils?(_|$)|wrapper|mp_size|gpc", re.IGNORECASE)


@pytest.mark.parametrize("module", MODULES)
def test_names_say_what_a_thing_is(module):
    defined = [
        node.name
        for node in ast.walk(tree(module))
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    ]
    poor = [name for name in (*module.split("."), *defined) if _POOR_NAMES.search(name)]
    assert not poor


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_left_undone(module):
    text = MODULES[module].read_text()
    assert not re.search(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError", text)


def test_text_files_name_no_machine_of_ours():
    """No home or scratch folder, and no package index, which is for each machine to choose."""
    for path in text_files():
        text = path.read_text()
        if path == Path(__file__):
            continue
        assert not re.search(r"(?<![\w.$}])/(work|tmp|root|home/\w+)/", text), path
        assert "index-url" not in text, path
        assert not re.search(r"!\[[^\]]*\]\(https?:", text), f"{path}: an image from another host"


def text_files() -> list[Path]:
    patterns = ["*.md", "*.yml", "*.toml", "*.cff", "Makefile", ".ci/*", "docs/**/*.md"]
    patterns += ["src/**/*.py", "tests/**/*.py", "scripts/*", "src/**/*.html*"]
    return [path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]


def test_links_of_the_front_pages_lead_somewhere():
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


# ------------------------------------------------------------------------------------ public face


def test_every_public_name_loads_and_is_documented():
    assert sorted(hairpin._HOMES) == sorted(hairpin.__all__) == dir(hairpin)
    for name in hairpin.__all__:
        thing = getattr(hairpin, name)
        assert inspect.getdoc(thing), f"hp.{name} has no docstring"
        members = vars(thing) if inspect.isclass(thing) else {}
        for member, value in members.items():
            if not member.startswith("_") and (callable(value) or isinstance(value, property)):
                assert inspect.getdoc(getattr(thing, member)), f"hp.{name}.{member}"


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'swich'"):
        hairpin.swich  # noqa: B018  # the look-up itself is what is tested


def test_the_api_page_lists_exactly_the_public_names():
    page = (ROOT / "docs/api.md").read_text()
    assert sorted(re.findall(r"^### `hp\.(\w+)", page, re.MULTILINE)) == sorted(hairpin.__all__)


def commands(group=None, path=("hairpin",)) -> Iterator[tuple[str, object]]:
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_documented(name):
    page = (ROOT / "docs/cli.md").read_text()
    section = re.search(rf"^## `{name}`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section is not None, f"docs/cli.md has no section '## `{name}`'"
    for parameter in COMMANDS[name].params:
        for option in (o for o in parameter.opts if o.startswith("--") and o != "--help"):
            assert f"`{option}" in section[1], f"docs/cli.md does not explain {name} {option}"


def test_the_error_page_names_every_error():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    for module in MODULES:
        for node in tree(module).body:
            if isinstance(node, ast.ClassDef) and re.search("(Error|Failed|Failure)$", node.name):
                assert f"`{node.name}`" in page, f"docs/troubleshooting.md lacks {node.name}"


# ------------------------------------------------------------------------------------ what it costs


EXTRAS = [
    "sklearn",
    "PIL",
    "matplotlib",
    "jinja2",
    "diffusers",
    "transformers",
    "esm",
    "triton",
    "gemmi",
    "safetensors",
]


def python(code: str, *, path: Path = ROOT / "src") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("code", ["import hairpin", "import hairpin.cli.app"])
def test_import_needs_neither_torch_nor_an_extra(code):
    foreign = ["torch", "numpy", *EXTRAS]
    done = python(f"import sys; {code}; print([m for m in {foreign} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_help_answers_in_half_a_second_without_torch():
    """Counted in processor time from the start of Python, so that other load does not count."""
    code = """
import sys, time
from hairpin.cli.app import main
sys.argv = ["hairpin", "--help"]
try:
    main()
except SystemExit as stop:
    print(stop.code or 0, "torch" in sys.modules, time.process_time())
"""
    tails = [python(code).stdout.splitlines()[-1].split() for _ in range(3)]
    assert all(tail[:2] == ["0", "False"] for tail in tails)
    assert min(float(tail[2]) for tail in tails) < 0.5


def test_every_module_imports_where_no_extra_is_installed():
    code = f"""
import sys
from importlib import import_module
from importlib.machinery import PathFinder

class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in {EXTRAS} else super().find_spec(name, path, target)

sys.meta_path = [WithoutExtras if finder is PathFinder else finder for finder in sys.meta_path]
for name in {[m for m in MODULES if not m.endswith("__main__")]}:
    import_module(name)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------- package


def test_the_version_is_written_alike_everywhere():
    version = PROJECT["project"]["version"]
    assert hairpin.__version__ == version
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^version: {re.escape(version)}$", citation, re.MULTILINE)


def test_every_disabled_lint_rule_has_a_reason():
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("\nignore = [") : text.index("[tool.ruff.lint.pydocstyle]")]
    for line in block.splitlines():
        if re.match(r'\s+"[A-Z]+[0-9]+"', line):
            assert "#" in line, line


@pytest.mark.skipif(find_spec("hatchling") is None, reason="needs hatchling: pip install hatchling")
def test_the_wheel_works_with_the_source_gone(tmp_path):
    """Everything under src/hairpin is in the wheel, and the command runs from it."""
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run([*build, "--directory", tmp_path], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"hairpin/{path.relative_to(SOURCE).as_posix()}"
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted <= packed
    assert "hairpin/py.typed" in packed
    code = (
        'import sys; sys.argv = ["hairpin", "--version"]; from hairpin.cli.app import main; main()'
    )
    done = python(code, path=wheel)
    assert done.stdout.strip() == hairpin.__version__, done.stderr
