"""What `mkdocs build` does beside mkdocs: see `hooks` in mkdocs.yml."""

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoflip_flwr import settings

#: Where the tables of all settings stand.
_HERE = "<!-- settings -->"

#: A link to a file of the checkout that is no page.
_OUTSIDE = re.compile(r"\[([^]]*)\]\((?:\.\./)+(?!adr/)([^)#]*)[^)]*\)")


def on_config(config: Any) -> Any:
    """Fill in the nav: all decision records; without pages that are not there."""
    docs = Path(config.docs_dir)

    def there(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {name: there(inner) for name, inner in entry.items()}
        if isinstance(entry, list):
            return [found for one in entry if (found := there(one))]
        if entry == "adr":
            pages = sorted(docs.glob("adr/*.md"))
            return {"Decisions": [str(page.relative_to(docs)) for page in pages]}
        return entry if (docs / entry).exists() else None

    config.nav = there(config.nav)
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put in README and settings; show links to what is no page as names of files."""
    if page.file.src_path == "index.md":
        readme = Path(page.file.abs_src_path).parents[1] / "README.md"
        text = re.sub(r"^\[!\[.*\n", "", readme.read_text(encoding="utf-8"), flags=re.M)
        text = re.sub(r"\]\((?!http|docs/)", "](../", text)
        markdown = text.replace("](docs/", "](")
    markdown = _OUTSIDE.sub(r"\1 (`\2`)", markdown)
    return markdown.replace(_HERE, settings_tables())


def settings_tables() -> str:
    """Return a table for each group of settings."""
    found = []
    for name, field in settings.Settings.model_fields.items():
        group = field.annotation
        if inspect.isclass(group) and issubclass(group, settings.Group):
            rows = [
                f"| `{name}.{key}` | {values} | `{default}` | {meaning} |"
                for key, values, default, meaning in documented(group)
            ]
            head = (
                f"## {name}\n\n{inspect.getdoc(group)}\n\n| key | values | default | |"
            )
            found.append("\n".join([head, "|---|---|---|---|", *rows]))
    return "\n\n".join(found)


def documented(group: type[settings.Group]) -> Iterator[tuple[str, str, str, str]]:
    """Yield key, values, default and meaning: the comment above or beside a field."""
    properties = group.model_json_schema()["properties"]
    above = ""
    for line in inspect.getsource(group).splitlines():
        code, _, comment = line.strip().partition("# ")
        name = code.partition(":")[0]
        if not code:
            above = f"{above} {comment}".strip()
        elif name in group.model_fields:
            key = name.replace("_", "-")
            values = settings._expected(properties[key]).replace("|", "\\|")
            default = json.dumps(properties[key].get("default"))
            yield key, values, default, f"{above} {comment}".strip()
            above = ""
        else:
            above = ""
