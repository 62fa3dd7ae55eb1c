"""One self-contained page that shows finished runs: `write_page`.

finished.py   a run folder, read and checked          per_class.py  accuracies of every class
gallery.py    images attacked at every lambda         summary.py    all that the page says, as JSON values
document.py   JSON, style and script become one file  *.html, *.css, *.js           the page itself
"""

from oat_dist.page.document import write_page

__all__ = ["write_page"]
