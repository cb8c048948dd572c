"""The pages: generated tables are current, links lead somewhere, every error has its remedy, README stays short."""

import json
import re
from pathlib import Path

import picture
import pytest
import tables
import yaml
from PIL import Image

from selfpruner_hub import __version__, errors
from selfpruner_hub.models.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for folder in (".", "docs", "benchmarks", "model_cards")
    for path in (ROOT / folder).glob("*.md")
    if not path.name.endswith("template.md")
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.S)


def anchors(page):
    """Of the headings, as GitHub and MkDocs write them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize(("name", "marker", "make"), tables.GENERATED, ids=lambda value: value if str(value) else "")
def test_generated_tables_are_current(name, marker, make):
    page = (ROOT / name).read_text(encoding="utf-8")
    assert page == tables.filled(page, marker, make()), "run: python benchmarks/tables.py"


def test_tables_take_rows_with_more_and_fewer_keys(monkeypatch):
    rows = [
        {"beta": 0.5, "minutes": 31.4},
        {"beta": 0.0, "perplexity_512": 26.71, "agreement": 0.983, "kept": 1},
        {"beta": 0.2, "achieved_beta": 0.2, "minutes": 47.3, "perplexity_512": 35.16, "perplexity_2048": 28.26}
        | {"perplexity_spread": 33.31}
        | {"kl_chat": 0.11, "agreement": 0.873, "answered": 0.55, "kept": 0.914, "kl_code": 0.428},
    ]
    monkeypatch.setattr(tables, "_defaults", lambda: sorted(rows, key=lambda row: row["beta"]))
    lines = tables.defaults_table().splitlines()
    assert lines[2] == "| dense | 134.5 M | 26.7 | – | – | 98 % | 100 % | – | – |"
    assert lines[3] == "| 0.2 | 113.3 M | 35.2 | 28.3 | 33.3 | 87 % | 91 % | 0.43 | 47 |"
    assert lines[4] == "| 0.5 | 81.4 M | – | – | – | – | – | – | 31 |"
    assert "still answers 91 % at β = 0.2." in tables.defaults_table()


def test_growth_with_tokens_is_fitted_over_what_was_trained(monkeypatch):
    cut = {"beta": 0.3, "asked_tokens": 0, "tokens": 0, "perplexity_spread": 9.0, "kl_chat": 9.0, "kl_code": 9.0}
    rows = [
        cut | {"asked_tokens": 2**n, "tokens": 2**n, "perplexity_spread": 0.9**n, "kl_chat": 0.8**n, "kl_code": 0.7**n}
        for n in (7, 5, 6)
    ]
    in_all = cut | {"asked_tokens": None, "asked": 30, "tokens": 64}
    monkeypatch.setattr(tables, "_rows", lambda _file: [in_all, *rows, cut])
    text = tables.growth_table()
    assert "takes 10.0 % off the perplexity, 20.0 % off the KL on conversations, 30.0 % off the KL on code" in text
    assert [line.split(" | ")[1] for line in text.splitlines()[2:6]] == ["–", "32", "64", "128"]
    refused = cut | {"beta": 0.2, "asked_tokens": None, "asked": 60, "minutes": 60}
    monkeypatch.setattr(tables, "_rows", lambda _file: [refused, in_all, *rows, cut])
    asked = [line.split(" | ")[1:4:2] for line in tables.minutes_table().splitlines()[2:4]]
    assert [line[0] for line in asked] == ["60", "30"]
    assert "refused" in tables.minutes_table()


def test_a_page_without_markers_is_refused():
    with pytest.raises(SystemExit, match="<!-- x -->"):
        tables.filled("no markers", "x", "text")


def test_the_picture_shows_what_the_json_says():
    with Image.open(picture.PICTURE) as image:
        assert json.loads(image.info["Description"]) == picture.points(), "run: python benchmarks/picture.py"


@pytest.mark.parametrize("name", picture.CURVES)
def test_the_curves_of_searches_are_those_of_the_json(name):
    with Image.open(picture.IMAGES / f"{name}.png") as image:
        assert json.loads(image.info["Description"]) == picture.curves(name), "run: python benchmarks/picture.py"
    assert f"](images/{name}.png)" in (DOCS / "results.md").read_text(encoding="utf-8")
    searches = [each for panel in picture.curves(name).values() for found in panel.values() for each in found]
    assert len(searches) >= 4
    for rounds in searches:  # the best so far never gets worse
        spent, best = zip(*rounds, strict=True)
        assert (list(spent), list(best)) == (sorted(spent), sorted(best, reverse=True))


def of_two(tokens):
    """Rows of a benchmark of a model, cut and recovered (of no tokens: refused), with others of uniform widths."""
    speed = {key: {"prefill": 1.5, "decode": 1.2} for key in picture.RUNTIMES.values()}
    cut = {"beta": 0.3, "widths": "own", "asked_tokens": 0, "perplexity_spread": 30.0, "kept": 0.4, "speed": speed}
    recovered = cut | {"asked_tokens": 8, "tokens": tokens, "perplexity_spread": 25.0 if tokens else 30.0}
    others = [each | {"widths": "uniform", "perplexity_spread": 99.0} for each in (cut, recovered)]
    return [{"beta": 0.0, "perplexity_spread": 20.0, "kept": 1}, cut, recovered, *others]


def test_the_picture_is_of_own_widths_before_and_after_recovery(monkeypatch, tmp_path):
    monkeypatch.setattr(picture, "_results", lambda _name: of_two(8))
    shown = picture.points()
    assert shown["perplexity_spread"] == {
        f"{runtime}, {state}": [[0.0, 1.0, 20.0], [0.3, 1.5, perplexity]]
        for runtime in picture.RUNTIMES
        for state, perplexity in (("recovered", 25.0), ("cut", 30.0))
    }
    picture.draw_points(shown, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.parametrize(("tokens", "cell"), [(8, "30.0 → 25.0"), (0, "30.0")])
def test_readmes_table_shows_a_recovery_that_was_kept(monkeypatch, tokens, cell):
    monkeypatch.setattr(tables, "_rows", lambda _file: of_two(tokens))
    dense, cut = tables.readme_table().splitlines()[2:4]
    assert dense.startswith("| dense | 134.5 M | 20.0 |")
    assert cut.split(" | ")[2] == cell


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(found), f"{page.name} links to {target}"
        if page.parent == DOCS:
            assert found.is_relative_to(DOCS), f"{target} is not on the site"


def test_every_page_is_in_the_menu_of_the_site_and_on_its_first_page():
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = set(re.findall(r"'(\w+\.md)'", str(menu)))
    assert listed == {path.name for path in DOCS.glob("*.md")}
    first = (DOCS / "index.md").read_text(encoding="utf-8")
    assert not [name for name in listed - {"index.md"} if f"]({name})" not in first]


def test_every_supported_type_is_on_the_page_of_models():
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| [A-Z]", page, re.M)
    dense, mixtures = (
        sorted(n for n, row in ARCHITECTURES.items() if bool(row.experts) == has) for has in (False, True)
    )
    assert listed == dense + mixtures
    assert f"Text decoders of {len(listed)} types" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_error_has_its_remedy():
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+Error)` \| (.+?) \| (.+?) \|$", page, re.M)
    assert {name for name, _, _ in rows} == classes
    assert len(rows) == len(classes)


def test_every_extra_is_on_the_page_of_installation():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", section, re.M))
    page = (DOCS / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.M)) == extras


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{__version__}]\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
