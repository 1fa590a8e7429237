"""Where documents come from: files, addresses and the Hub, in every format, broken ones too.

`opening` finds what settings name; `corpus` is what the rest of the program reads. Owns every check of the content
itself. Does not tokenise, split or cache it.
"""

from __future__ import annotations

from lmtrain.data.sources.corpus import Corpus
from lmtrain.data.sources.opening import open_corpus

__all__ = ["Corpus", "open_corpus"]
