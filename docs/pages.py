"""The pages of the site: the README, what the experiments found, and one for each module, from its docstrings."""

import logging
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
MODULES = re.findall(r"(?m)^    (\w+)  ", (ROOT / "gdjax" / "__init__.py").read_text().split('"""')[1])

log = logging.getLogger("mkdocs.plugins.pages")  # below "mkdocs", so that --strict counts its warnings


def on_config(config):
    """List the pages: the modules in the order in which gdjax lists them."""
    modules = [{name: f"gdjax/{name}.md"} for name in MODULES]
    config.nav = [{"gdjax": "index.md"}, {"Experiments": "experiments/README.md"}, {"Modules": modules}]
    config.nav += [{"Contributing": "CONTRIBUTING.md"}, {"Changelog": "CHANGELOG.md"}]


def on_files(files, config):
    """Add the pages, and what they link to where they expect it."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    for name in MODULES:
        files.append(File.generated(config, f"gdjax/{name}.md", content=f"::: gdjax.{name}\n"))
    experiments = ("experiments/*.py", "experiments/README.md", "experiments/results/*/*")
    for pattern in (*experiments, "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"):
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))


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
