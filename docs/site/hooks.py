"""For mkdocs: links to files of the repository that are no pages of the site become plain text."""

import re
from pathlib import Path

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown, page, config, files):
    """Replace what leads out of the folder of pages."""
    docs = Path(config.docs_dir).resolve()
    here = (docs / page.file.src_path).parent

    def kept(match):
        text, target, _ = match.groups()
        if "://" in target or (here / target).resolve().is_relative_to(docs):
            return match.group()
        return text

    return LINK.sub(kept, markdown)
