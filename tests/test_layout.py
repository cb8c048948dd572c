"""The layout: imports point down, packages and modules stay small, and the wheel is complete."""

import ast
import graphlib
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "selfpruner_hub"
ARCHITECTURE = "docs/architecture.md"

# Bottom to top. A module imports from its own package and from the layers below it; packages of one layer do not import
# each other. Names are those inside selfpruner_hub, save for `exporters`, which stands beside it.
LAYERS = (
    {"errors", "interrupts", "progress"},
    {"plans", "settings"},
    {"ranks", "endpoint"},
    {"storage"},
    {"models"},
    {"calibration"},
    {"pruning", "exporters"},
    {"evaluation"},
    {"search", "recovery"},
    {"provenance", "memory"},
    {"hub"},
    {"retraining"},
    {"pruned_model", "aim"},
    {"cut"},
    {"pruner"},
    {"cli"},
    {PACKAGE},  # selfpruner_hub/__init__.py
)
PURE = LAYERS[0] | LAYERS[1]
HEAVY_OR_NETWORK = {
    *("torch", "transformers", "optimum", "accelerate", "datasets", "huggingface_hub"),
    *("requests", "httpx", "httpx2", "aiohttp", "urllib", "http", "socket", "ssl"),
}
WITHOUT_TORCH = {"search.loop", "search.llm.prompts", "search.journal", "search.journal_lines"}
MAX_LINES = 330
MAX_MODULES = 12
MAX_PARAMETERS = 7
MANY_PARAMETERS = {
    # What users call: each parameter is a keyword of their own, and an option of the command line.
    "selfpruner_hub.pruner.prune",
    "selfpruner_hub.retraining.recover",
    "exporters.export.export_model",
    # The arguments are those of transformers' PushToHubMixin.
    "selfpruner_hub.pruned_model.push_to_hub",
    "selfpruner_hub.hub.publish.publish",
    # One form of sampling, with its settings, for all text that a model writes.
    "selfpruner_hub.calibration.generated_text.continuations",
    "selfpruner_hub.calibration.corpus.load_corpus",
}
"""Functions with more than `MAX_PARAMETERS` parameters, keyword-only ones included, and why."""

# Written as patterns, so that this file does not find itself.
PRIVATE_ADDRESSES = re.compile(r"index[-_]url|find[-_]links|pypi\.org[/]simple|(?<![\w.])/(work|root)[/]", re.I)


def inside(module: str) -> str:
    """The name of one of our modules inside the package: `selfpruner_hub.search.loop` is `search.loop`."""
    return module.removeprefix(f"{PACKAGE}.")


def unit(module: str) -> str:
    """The package or top-level module that a module belongs to: of `selfpruner_hub.search.llm.prompts`, `search`."""
    return inside(module).split(".")[0]


def layer(module: str) -> int:
    for level, units in enumerate(LAYERS):
        if unit(module) in units:
            return level
    pytest.fail(f"{module} has no layer: give it one in LAYERS of {Path(__file__).name}")


def find_modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for top in (PACKAGE, "exporters"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = find_modules()
each_module = pytest.mark.parametrize("module", MODULES)


def imports(module: str, anywhere: bool = True) -> set[str]:
    """Dotted names of all that a module imports, relative imports resolved.

    With `anywhere`, imports inside of functions count too.
    """
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outer = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            source = ".".join([*outer, *([node.module] if node.module else [])])
            members = {f"{source}.{alias.name}" for alias in node.names}
            submodules = members & MODULES.keys()
            found |= submodules | ({source} if members - submodules else set())
    return found


def ours(names: set[str]) -> set[str]:
    """Those names that are of our two packages."""
    return {name for name in names if name.split(".")[0] in (PACKAGE, "exporters")}


def distributions(module: str) -> set[str]:
    """Top-level names of what a module imports."""
    return {name.split(".")[0] for name in imports(module)}


def tracked_files() -> list[Path]:
    """What git tracks, or would with the next `git add .`."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for path in map(Path, names.split("\0")[:-1]) if (ROOT / path).is_file()]


@each_module
def test_imports_point_down(module):
    others = {name for name in ours(imports(module)) if unit(name) != unit(module)}
    wrong = sorted(name for name in others if layer(name) >= layer(module))
    assert not wrong, f"{module} (layer {layer(module)}) imports from its own layer or above: {', '.join(wrong)}"


def test_no_two_modules_import_each_other():
    """Directly or through others; what a function imports when it is called does not count."""
    graph = {module: ours(imports(module, anywhere=False)) - {module} for module in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@each_module
def test_pruning_needs_no_exporters(module):
    """Only the command line imports them, and the modules that export or measure, at the moment when they do."""
    if unit(module) in ("cli", "exporters"):
        return
    lazy = inside(module) in ("pruned_model", "hub.exports", "aim")
    found = {name for name in imports(module, anywhere=not lazy) if unit(name) == "exporters"}
    assert not found, f"{module} imports {', '.join(sorted(found))}"


@each_module
def test_modules_import_only_what_their_layer_allows(module):
    name, imported = inside(module), distributions(module)
    if unit(module) in PURE:
        assert not imported & HEAVY_OR_NETWORK
    if name in WITHOUT_TORCH:
        assert "torch" not in imported
    if name == "models.modeling_selfpruned":  # a copy of it travels with each model
        assert imported <= {"torch", "transformers"} | sys.stdlib_module_names


@each_module
def test_modules_are_short(module):
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines; split it by what it does"


def test_functions_have_few_parameters():
    """A function of many parameters lacks an object that holds those which go together."""
    found = set()
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([each for each in given if each.arg not in ("self", "cls")]) > MAX_PARAMETERS:
                    found.add(f"{module}.{node.name}")
    assert found == MANY_PARAMETERS


def test_packages_are_small():
    modules = Counter(path.parent.relative_to(ROOT) for path in MODULES.values() if path.name != "__init__.py")
    large = {str(folder): count for folder, count in modules.items() if count > MAX_MODULES}
    assert not large, f"more than {MAX_MODULES} modules; split by what they do: {large}"


def test_names_say_what_modules_do():
    assert not [str(path) for path in tracked_files() if path.name == "utils.py"]


def test_the_package_is_typed():
    assert (ROOT / PACKAGE / "py.typed").is_file()


def test_the_table_of_layers_is_the_one_that_is_enforced():
    text = (ROOT / ARCHITECTURE).read_text(encoding="utf-8")
    rows = [set(re.findall(r"`(\w+)/?`", row)) for row in re.findall(r"^\| (`.*?) \|", text, re.M)]
    assert rows == list(reversed(LAYERS[:-1]))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_pages_link_to_the_architecture(page):
    assert f"]({ARCHITECTURE})" in (ROOT / page).read_text(encoding="utf-8")


def test_no_private_address_is_tracked():
    found = [
        f"{path}: {match[0]}"
        for path in tracked_files()
        if (match := PRIVATE_ADDRESSES.search((ROOT / path).read_text(encoding="utf-8", errors="ignore")))
    ]
    assert not found


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    wheel = pytest.importorskip("hatchling.builders.wheel")
    target = tmp_path_factory.mktemp("wheel")
    built = next(wheel.WheelBuilder(str(ROOT)).build(directory=str(target), versions=["standard"]))
    return set(zipfile.ZipFile(built).namelist())


@pytest.mark.parametrize(
    ("source", "place"),
    [
        (PACKAGE, PACKAGE),
        ("exporters", "exporters"),
        (f"{PACKAGE}/search/llm/templates", f"{PACKAGE}/search/llm/templates"),
        ("spaces", f"{PACKAGE}/spaces"),
        ("optimum", "optimum"),
    ],
)
def test_the_wheel_carries(source, place, wheel_names):
    files = [path.relative_to(source) for path in tracked_files() if path.is_relative_to(source)]
    assert files, f"{source}/ is empty"
    missing = sorted(str(path) for path in files if str(place / path) not in wheel_names)
    assert not missing, f"the wheel lacks {', '.join(missing)} of {source}/"


def test_the_wheel_carries_the_templates_of_cards_and_no_card(wheel_names):
    cards = [name for name in wheel_names if name.startswith(f"{PACKAGE}/model_cards/")]
    assert sorted(cards) == [f"{PACKAGE}/model_cards/{name}.md" for name in ("onnx_template", "template")]


def test_the_wheel_has_two_packages_and_the_plug_in(wheel_names):
    folders = {name.split("/")[0] for name in wheel_names if ".dist-info/" not in name}
    assert folders == {PACKAGE, "exporters", "optimum"}
    assert [name for name in wheel_names if name.startswith("optimum/")] == [
        "optimum/commands/register/register_selfpruned.py"  # and no `__init__.py`: the namespace is optimum's
    ]
