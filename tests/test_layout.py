"""The house stands: imports point down, modules stay small, the README is complete, the wheel too."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "selfpruner_hub"

# Bottom to top. A module imports from its own layer and from those below it; a package's name stands for those of its
# modules that are not named themselves. Names are those inside selfpruner_hub, save for `exporters`, which stands
# beside it.
LAYERS = (
    {"plans", "errors", "progress"},
    {"models.architectures", "models.modeling_selfpruned"},
    {
        *("calibration", "calibration.corpus", "calibration.generated_text", "hub.licences"),
        *("models", "models.hub_errors", "models.loading", "models.layer_stream", "models.forward", "models.patching"),
        *("pruning", "pruning.importance", "pruning.output_repair", "pruning.sequential_repair"),
        *("pruning.least_squares", "pruning.slicing", "storage.offload", "storage.checkpoints", "storage.layout"),
    },
    {"evaluation"},
    {"search"},
    {"hub", "storage", "settings", "search.choose_proposer", "provenance", "evaluation.tasks", "exporters"},
    {"search.ray_workers"},
    {"pruned_model", "search.find_plan"},
    {"pruner"},
    {"cli.demo"},
    {"cli"},
    {PACKAGE},  # selfpruner_hub/__init__.py
)
PURE = LAYERS[0]
HEAVY_OR_NETWORK = {
    *("torch", "transformers", "optimum", "accelerate", "datasets", "huggingface_hub"),
    *("requests", "httpx", "aiohttp", "urllib", "http", "socket", "ssl"),
}
WITHOUT_TORCH = {"search.loop", "search.llm.prompts", "search.journal"}
MAX_LINES = 330

# Written as patterns, so that this file does not find itself.
PRIVATE_ADDRESSES = re.compile(r"index[-_]url|find[-_]links|pypi\.org[/]simple|(?<![\w.])/(work|root)[/]", re.I)


def room(module: str) -> str:
    """The short name of one of our modules: `selfpruner_hub.search.loop` is `search.loop`."""
    return module.removeprefix(f"{PACKAGE}.")


def layer(module: str) -> int:
    parts = room(module).split(".")
    for length in range(len(parts), 0, -1):
        for level, rooms in enumerate(LAYERS):
            if ".".join(parts[:length]) in rooms:
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


def imports(module: str) -> set[str]:
    """Dotted names of all that a module imports, anywhere in it, relative imports resolved."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outer = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            source = ".".join([*outer, *([node.module] if node.module else [])])
            members = {f"{source}.{alias.name}" for alias in node.names}
            submodules = members & MODULES.keys()
            found |= submodules | ({source} if members - submodules else set())
    return found


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
    ours = {name for name in imports(module) if name.split(".")[0] in (PACKAGE, "exporters")}
    upward = sorted(name for name in ours if layer(name) > layer(module))
    assert not upward, f"{module} (layer {layer(module)}) imports from above: {', '.join(upward)}"


@each_module
def test_modules_import_only_what_their_room_allows(module):
    name, imported = room(module), distributions(module)
    if name in PURE or name.split(".")[0] in PURE:
        assert not imported & HEAVY_OR_NETWORK
    if name in WITHOUT_TORCH:
        assert "torch" not in imported
    if name == "models.modeling_selfpruned":  # a copy of it travels with each model
        assert imported <= {"torch", "transformers"} | sys.stdlib_module_names


@each_module
def test_modules_are_short(module):
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines; split it by what it does"


def test_names_tell_their_room():
    assert not [str(path) for path in tracked_files() if path.name == "utils.py"]


def test_the_package_is_typed():
    assert (ROOT / PACKAGE / "py.typed").is_file()


def test_the_readme_names_every_file_and_folder():
    named = set(re.findall(r"[\w.-]+/?", (ROOT / "README.md").read_text(encoding="utf-8")))
    tracked = [path for path in tracked_files() if len(path.parts) > 1 and path.parts[0][0] != "."]
    files = {path.name for path in tracked if path.parts[0] in (PACKAGE, "exporters")} - {"__init__.py"}
    folders = {f"{path.parts[0]}/" for path in tracked}
    missing = sorted((files | folders) - named)
    assert not missing, f"the tree in README.md does not name {', '.join(missing)}"


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
    ("source", "inside"),
    [
        (PACKAGE, PACKAGE),
        ("exporters", "exporters"),
        (f"{PACKAGE}/search/llm/templates", f"{PACKAGE}/search/llm/templates"),
        ("spaces", f"{PACKAGE}/spaces"),
        ("optimum", "optimum"),
    ],
)
def test_the_wheel_carries(source, inside, wheel_names):
    files = [path.relative_to(source) for path in tracked_files() if path.is_relative_to(source)]
    assert files, f"{source}/ is empty"
    missing = sorted(str(path) for path in files if str(inside / path) not in wheel_names)
    assert not missing, f"the wheel lacks {', '.join(missing)} of {source}/"


def test_the_wheel_carries_the_template_of_cards_and_no_card(wheel_names):
    cards = [name for name in wheel_names if name.startswith(f"{PACKAGE}/model_cards/")]
    assert cards == [f"{PACKAGE}/model_cards/template.md"]


def test_the_wheel_has_two_packages_and_the_plug_in(wheel_names):
    folders = {name.split("/")[0] for name in wheel_names if ".dist-info/" not in name}
    assert folders == {PACKAGE, "exporters", "optimum"}
    assert [name for name in wheel_names if name.startswith("optimum/")] == [
        "optimum/commands/register/register_selfpruned.py"  # and no `__init__.py`: the namespace is optimum's
    ]
