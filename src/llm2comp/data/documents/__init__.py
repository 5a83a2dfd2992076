"""Documents of a user: files of many formats → blocks of text under headings → passages."""

from llm2comp.data.documents.blocks import Block, Document, Headings
from llm2comp.data.documents.passages import OVERLAP, SIZE, Offsets, Passage, passages
from llm2comp.data.documents.reading import (
    MOST_BYTES,
    READERS,
    Report,
    documents,
    find_files,
    read_document,
    read_or_report,
)

__all__ = [
    "MOST_BYTES",
    "OVERLAP",
    "READERS",
    "SIZE",
    "Block",
    "Document",
    "Headings",
    "Offsets",
    "Passage",
    "Report",
    "documents",
    "find_files",
    "passages",
    "read_document",
    "read_or_report",
]
