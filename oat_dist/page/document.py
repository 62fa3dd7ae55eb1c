"""The page as one file: values as JSON, style and script inside, nothing from anywhere else.

Names come from users. They reach the page as JSON, in which no `<` is left that could end the element it stands in, and
the script makes text of them, never markup. A content security policy lets exactly our own script and style count.
"""

import base64
import hashlib
import html
import json
import os
import pathlib
import string
from collections.abc import Sequence
from importlib import resources

from oat_dist.distributed import default_device
from oat_dist.errors import UserError
from oat_dist.page.finished import open_finished
from oat_dist.page.summary import page_values
from oat_dist.weights import whole_file

IMAGES = 12
"""Images of a gallery."""
_SCRIPTS = ("chart.js", "curves.js", "moment.js", "tables.js", "page.js")
_IN_SCRIPT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def write_page(
    runs: Sequence[pathlib.Path], path: pathlib.Path, *, data_root: str | None = None, num_images: int = IMAGES
) -> None:
    """Write the page of finished runs.

    Args:
        runs: Folders of runs; one that is named twice is shown once.
        path: Target; it appears whole or not at all.
        data_root: Folder of data sets; default: that of each run.
        num_images: Images of each gallery, at most.

    Raises:
        UserError: It cannot be written, or a run is missing, unfinished or damaged; found before anything is computed.
    """
    _require_writable(path)
    different = {pathlib.Path(run).resolve(): pathlib.Path(run) for run in runs}
    finished = [open_finished(run, data_root=data_root) for run in different.values()]
    text = render(page_values(finished, device=default_device(), num_images=num_images))
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render(values: dict) -> str:
    """The page as HTML.

    Args:
        values: From `oat_dist.page.summary.page_values`.
    """
    style, script = _file("page.css"), "".join(map(_file, _SCRIPTS))
    data = json.dumps(values, allow_nan=False, separators=(",", ":"))
    for character, escaped in _IN_SCRIPT.items():
        data = data.replace(character, escaped)
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    template = string.Template(_file("page.html"))
    title = html.escape(values["title"])
    return template.substitute(title=title, policy=policy, style=style, script=script, data=data)


def _require_writable(path: pathlib.Path) -> None:
    if path.is_dir():
        raise UserError(f"--out {path}: a folder; name a file")
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror or error}") from None


def _file(name: str) -> str:
    return resources.files("oat_dist.page").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
