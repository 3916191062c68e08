"""The pages of the site: README, guides, pages of docs/, what the experiments found, and the API, room by room."""

import html
import logging
import re
import sys
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))
import executed  # noqa: E402

log = logging.getLogger("mkdocs.plugins.pages")  # below "mkdocs", so that --strict counts its warnings

PAGES = {
    "Commands": "commands.md",
    "Your own model": "models.md",
    "Ways to compute the noise scale": "noise_scale.md",
    "Runs": "runs.md",
    "Speed": "speed.md",
    "Other libraries": "others.md",
}
API = "::: {}\n    options:\n      heading_level: 1\n"
FRONT = "---\nhide: [navigation, toc]\n---\n"  # the width is for code
FROM_ROOT = ("CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE")
EXPERIMENTS = ("experiments/*.py", "experiments/*.md", "experiments/results/*/*")


def rooms() -> dict[str, list[str]]:
    """Return {heading: rooms}, in the order in which gdjax lists them."""
    found: dict[str, list[str]] = {}
    for heading, room in re.findall(r"(?m)^    (?:(\w+)|(\w+)  .*)$", (ROOT / "gdjax/__init__.py").read_text()):
        if heading:
            found[heading] = []
        elif found:
            found[[*found][-1]].append(room)
    return {heading: rooms for heading, rooms in found.items() if rooms}


def parts(room: str) -> list[str]:
    """Return the public modules inside a room, apart from those that only serve a command."""
    found = sorted(path.stem for path in (ROOT / "gdjax" / room).glob("[!_]*.py"))
    return ["experiment"] if room == "commands" else found


def on_config(config):
    """List the pages."""
    guides = [{title_of(path): f"guides/{path.stem}.md"} for path in sorted((ROOT / "docs/guides").glob("*.py"))]
    api = [{"All public names": "names.md"}]
    for heading, names in rooms().items():
        pages = []
        for name in names:
            inner = [{part: f"gdjax/{name}/{part}.md"} for part in parts(name)]
            pages.append({name: [f"gdjax/{name}.md", *inner] if inner else f"gdjax/{name}.md"})
        api.append({heading.capitalize(): pages})
    config.nav = [
        {"gdjax": "index.md"},
        {"Guides": guides},
        {"Pages": [{title: path} for title, path in PAGES.items()]},
        {"Experiments": [{"Gallery": "gallery.md"}, {"What they found": "experiments/README.md"}]},
        {"Reference": api},
        {"Project": [{"Contributing": "CONTRIBUTING.md"}, {"Changelog": "CHANGELOG.md"}]},
    ]
    if (ROOT / "experiments/LEDGER.md").exists():
        config.nav[3]["Experiments"].insert(0, {"Ledger of claims": "experiments/LEDGER.md"})


def title_of(path: Path) -> str:
    """Return the title of a guide."""
    return re.search(r"(?m)^# # (.+)$", path.read_text())[1]


def on_files(files, config):
    """Add the pages, and what they link to where they expect it."""
    generated = {"index.md": FRONT + for_the_site((ROOT / "README.md").read_text()), "gallery.md": gallery()}
    for guide in executed.guides():
        generated[f"guides/{guide.name}.md"] = guide.page
        generated[f"guides/{guide.name}.ipynb"] = guide.notebook
        generated |= {f"guides/{name}": figure for name, figure in guide.figures.items()}
    for names in rooms().values():
        for name in names:
            generated[f"gdjax/{name}.md"] = API.format(f"gdjax.{name}")
            for part in parts(name):
                generated[f"gdjax/{name}/{part}.md"] = API.format(f"gdjax.{name}.{part}")
    generated["names.md"] = all_names()
    for path, content in generated.items():
        files.append(File.generated(config, path, content=content))
    for pattern in (*EXPERIMENTS, *FROM_ROOT):
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))


def for_the_site(markdown: str) -> str:
    """Turn links between files of the repository into links between pages."""
    markdown = markdown.replace("](docs/guides)", "](guides/1_train.md)")
    markdown = re.sub(r"\]\((?:docs/)?(guides/\w+)\.py\)", r"](\1.md)", markdown)
    return markdown.replace("](docs/", "](").replace("](../", "](")


def on_page_markdown(markdown, page, config, files):
    """Links of the pages in docs/ lead out of it."""
    return for_the_site(markdown) if page.file.src_uri in PAGES.values() else markdown


def on_pre_page(page, config, files):
    """Let 'edit this page' lead to the file that a page is made of."""
    path = page.file.src_uri
    source = {"index.md": "README.md", "names.md": "gdjax/__init__.py", "gallery.md": "docs/site.py"}.get(path)
    if path.startswith("guides/"):
        source = f"docs/{path.removesuffix('.md')}.py"
    elif path.startswith("gdjax/"):
        module = path.removesuffix(".md")
        source = f"{module}.py" if (ROOT / f"{module}.py").exists() else f"{module}/__init__.py"
    elif source is None:
        source = path if (ROOT / path).exists() else f"docs/{path}"
    page.edit_url = f"{config.repo_url.rstrip('/')}/edit/main/{source}" if config.repo_url else None
    return page


def on_page_content(content, page, config, files):
    """Make MathML of mathematics, which needs no script and no font of another host."""
    inline = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', _inline, content, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', _display, inline, flags=re.DOTALL)


def _inline(found):
    return convert(html.unescape(found[1]).strip())


def _display(found):
    return convert(html.unescape(found[1]).strip(), display="block")


def gallery() -> str:
    """Return a page of thumbnails: the question of every experiment, and the figure that answers it."""
    cards = []
    for path in sorted((ROOT / "experiments/results").glob("*/figure.png")):
        name = path.parent.name.removesuffix("-full")
        source = ROOT / "experiments" / f"{name}.py"
        if source.exists():
            question = source.read_text().split('"""')[1].split("\n\n")[0].replace("\n", " ")
            figure = f"experiments/results/{path.parent.name}/figure.png"
            question += " (larger)" if path.parent.name.endswith("-full") else ""
            cards.append(f"[![]({figure}) {question}](experiments/README.md#{name})")
    cards = [re.sub(r"\) (.+)\]\(", r") <span>\1</span>](", card) for card in cards]
    return '# The questions\n\n<div class="gallery" markdown>\n\n' + "\n".join(cards) + "\n\n</div>\n"


def all_names() -> str:
    """Return the page of all public names, each with the first sentence of its docstring."""
    package, lines = griffe.load("gdjax", search_paths=[str(ROOT)], resolve_aliases=True), ["# All public names"]
    for names in rooms().values():
        for room in names:
            modules = [package[room], *(package[room][part] for part in parts(room))]
            for module in modules:
                lines += ["", f"## [{module.path}][]", ""]
                members = module.exports or [name for name, x in module.members.items() if not x.is_alias]
                for name in sorted((str(name) for name in members), key=str.lower):
                    member = module.members[name]
                    if name[0] != "_" and not member.is_module and member.docstring:
                        said = re.split(r"(?<=\.)\s|\n\n", member.docstring.value.strip())[0].replace("\n", " ")
                        lines.append(f"- [`{name}`][{module.path}.{name}]: {said}")
    return "\n".join(lines) + "\n"


class Docstrings(griffe.Extension):
    """What our docstrings do that Markdown and griffe would take for something else."""

    def on_instance(self, *, obj, **kwargs):
        """Make doctests blocks of code; Markdown would make them quotations."""
        if obj.docstring:
            fenced = re.sub(r"(?m)^>>>.*(\n.+)*", lambda block: f"```pycon\n{block[0]}\n```", obj.docstring.value)
            obj.docstring.value = fenced

    def on_function(self, *, func, **kwargs):
        """Check the names of arguments, of which several may be explained together."""
        for name in _explained(func, griffe.DocstringSectionKind.parameters):
            if name not in func.parameters:
                log.warning("%s has no argument %r", func.path, name)

    def on_class(self, *, cls, **kwargs):
        """Check the names of attributes, likewise."""
        for name in _explained(cls, griffe.DocstringSectionKind.attributes):
            if name not in cls.members:
                log.warning("%s has no attribute %r", cls.path, name)


def _explained(obj, kind):
    """Yield the names in this section of a docstring; mend what griffe made of 'low, high: ends', a name and a type."""
    found = [section.value for section in obj.docstring.parsed if section.kind is kind] if obj.docstring else []
    for item in [item for items in found for item in items]:
        if item.name.endswith(","):
            item.name, item.annotation = f"{item.name} {str(item.annotation).strip('()')}", None
        yield from item.name.split(", ")
